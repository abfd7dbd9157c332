"""A captured dataset on disk: parquet shards, each complete or absent, and the manifest that describes them."""

from distillkit.shards.arrays import signal_array as signal_array
from distillkit.shards.arrays import signal_table as signal_table
from distillkit.shards.arrays import signal_tensor as signal_tensor
from distillkit.shards.background import fitted_background as fitted_background
from distillkit.shards.background import read_background as read_background
from distillkit.shards.background import read_background_file as read_background_file
from distillkit.shards.background import write_background as write_background
from distillkit.shards.files import read_record as read_record
from distillkit.shards.files import write_shard as write_shard
from distillkit.shards.manifest import Manifest as Manifest
from distillkit.shards.manifest import ShardRecord as ShardRecord
from distillkit.shards.manifest import read_manifest as read_manifest
from distillkit.shards.manifest import write_manifest as write_manifest
from distillkit.shards.names import shard_name as shard_name
from distillkit.shards.verify import verify_shards as verify_shards
