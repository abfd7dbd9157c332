"""Losses: plain functions of student and teacher, the chunked head that calls them, and the objective of training."""

from distillkit.losses.alignment import AlignedLayer as AlignedLayer
from distillkit.losses.from_module import check_losses as check_losses
from distillkit.losses.functions import ATTENTION_LOSSES as ATTENTION_LOSSES
from distillkit.losses.functions import DISTRIBUTION_LOSSES as DISTRIBUTION_LOSSES
from distillkit.losses.functions import HIDDEN_STATE_LOSSES as HIDDEN_STATE_LOSSES
from distillkit.losses.functions import reduce as reduce
from distillkit.losses.layers import ModelShape as ModelShape
from distillkit.losses.objective import Objective as Objective
from distillkit.losses.objective import ObjectiveResult as ObjectiveResult
from distillkit.losses.ranking import preference_pair_counts as preference_pair_counts
from distillkit.losses.vocabulary_head import LossTerm as LossTerm
from distillkit.losses.vocabulary_head import chunked_vocabulary_losses as chunked_vocabulary_losses
from distillkit.models.labels import counted_rows as counted_rows
from distillkit.models.labels import shifted_labels as shifted_labels
