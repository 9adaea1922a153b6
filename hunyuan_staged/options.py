"""The defaults of every flag, and what a flag may be. The only home of every default."""

from hunyuan_staged.versions import LAYERS

DEFAULT_OUTPUT_DIR = "./stage_outputs"
DEFAULT_PROMPT = "a red circle moves left over a dark blue background"
DEFAULT_NEGATIVE_PROMPT = ""
DEFAULT_DTYPE = "auto"  # bf16 on a GPU, fp32 on a CPU
DEFAULT_ASPECT_RATIO = "16:9"
DEFAULT_SEED = 42
CFG_PARALLEL = ("auto", "on", "off")
DEFAULT_CFG_PARALLEL = "auto"
WEIGHTS_DTYPES = ("fp8",)  # of the blocks, where it is not that of the run
DEFAULT_SAGE_BLOCKS = f"0-{LAYERS - 1}"  # all, as in the official code
DEFAULT_FPS = 24
DEFAULT_COMPARISON_DIR = "./comparison"
DEFAULT_AMPLIFY = 8.0
DEFAULT_CHECKPOINT_EVERY = 5  # steps; 0: never

# What a flag may ask for at most: far beyond what the models were made for, and short of what no memory holds.
MAX_STEPS = 1000
