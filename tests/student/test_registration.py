"""After `import distillkit` transformers knows students, whichever of both is imported first, and no sooner."""

import subprocess
import sys

import pytest

KNOWN = (
    "; from transformers import AutoConfig, AutoModelForCausalLM"
    "; AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model('kda_hybrid'))]"
)


@pytest.mark.parametrize(
    "imports",
    [
        "import distillkit; from transformers import AutoConfig",
        "import distillkit; from transformers import PreTrainedModel",
        "import distillkit; from transformers import GenerationMixin",
        "import distillkit; import distillkit.training",
        "from transformers import AutoModelForCausalLM; import distillkit",
        "import transformers, distillkit",
    ],
)
def test_students_are_known_in_any_order_of_imports(imports):
    subprocess.run([sys.executable, "-c", imports + KNOWN], check=True)


def test_importing_the_package_alone_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import distillkit, sys; assert 'torch' not in sys.modules"], check=True)
