"""Mistakes that people make, over all commands: what they type, and what lies there instead of what should.

Each is a command line, run in the world of faults_malformed.py, and files put there before ("" for an empty
file, None for a folder). Each must end with exit code 2 and one line, and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Content = str | bytes | None

_LONG = "9" * 400
_DEEP = "[" * 5000


@dataclass(frozen=True)
class Mistake:
    """A command line and the files that it meets."""

    line: str
    files: Mapping[str, Content] = field(default_factory=dict)


def mistakes() -> Iterator[Mistake]:
    """All of them."""
    for lines in (_TYPED, _TRAIN, _ENCODE, _STORE, _SAMPLE, _RUNS, _CONVERT):
        yield from (Mistake(line) for line in lines.strip().splitlines())
    yield from (Mistake(f"train demo --dry-run --set '{each}'") for each in _SETS.strip().splitlines())
    yield from (Mistake("train own.yaml --dry-run", {"own.yaml": text}) for text in _RECIPES)
    for content in _NOT_JSON:
        yield Mistake("store info store", {"store/manifest.json": content})
        yield Mistake("store verify store", {"store/manifest.json": content})
        yield Mistake("train quick.yaml --set data.store=store", {"store/manifest.json": content})
        yield Mistake("encode pictures --size 16 --out half", {"half/begun.json": content})
        yield Mistake("sample run/pipeline x", {"run/pipeline/model_index.json": content})
        yield Mistake("sample run/pipeline x", {"run/pipeline/transformer/config.json": content})
        yield Mistake("train run --resume", {"run/recipe.yaml": content or "\0"})
        yield Mistake("encode --size 16 odd --out new", {"odd/0.png": b"", "odd/metadata.jsonl": content})
    yield from _PLACES


_TYPED = """
nonsense
--nonsense
train
train --set
train --nonsense demo
train demo --device
encode
encode pictures
store nonsense
store info
sample
sample run
evaluate
report
compare
compare run
convert
convert run
train demo --resume=5
sample run x --seed 1.5
sample run x --seed -1
sample run x --count 0
sample run x --batch 0
sample run x --steps two
evaluate run --prompts 0
evaluate run --seeds -3
demo --minutes 0
demo --minutes nan
demo --minutes soon
encode pictures --out new --size big
encode pictures --out new --max-bad much
"""

_TRAIN = """
train nothing
train nothing.yaml
train pictures
train .
train ''
train pictures/000.png
train quick.yaml --name ''
train quick.yaml --name a/b
train quick.yaml --name ../outside
train quick.yaml --name .
train quick.yaml --runs pictures/000.png
train quick.yaml --device tpu
train quick.yaml --device cuda
train quick.yaml --device cuda:7
train quick.yaml --device ''
train quick.yaml --dtype float64
train quick.yaml --dtype ''
train quick.yaml --resume
train quick.yaml --resume --runs nowhere
train run
train run --resume --set seed=1
train run --resume --set phases.0.lr=1
train run --resume --set model.depth=2
train run --resume --set optimizer.kind=adamw
train run --name run2 --set init=nowhere --runs new
train quick.yaml --set data.store=nowhere
train quick.yaml --set data.store=pictures
train quick.yaml --set data.store=pictures/000.png
train quick.yaml --set data.store=run
train quick.yaml --set data.store=store --set phases.0.size=64
train quick.yaml --set data.store=store --set data.autoencoder=other/one
train quick.yaml --set data.store=store --set data.text_encoder=other
train quick.yaml --set data.store=store --set data.pad=encoder
train quick.yaml --set data.store=s3://
train quick.yaml --set data.store=nonsense://there/store
train quick.yaml --set init=nowhere --set data.store=store
train quick.yaml --set init=pictures --set data.store=store
"""

_SETS = f"""
nonsense
nonsense=1
=1
=
phases
phases=
phases=[]
phases=1
phases.0=
phases.7.lr=1
phases.x.lr=1
phases.-1.lr=1
phases.0.lr
phases.0.lr=
phases.0.lr=-1
phases.0.lr=0
phases.0.lr=nan
phases.0.lr=inf
phases.0.lr=fast
phases.0.lr=1e999
phases.0.lr=[1]
phases.0.lr=true
phases.0.images=-5
phases.0.images=0
phases.0.images=1.5
phases.0.images=many
phases.0.images=1e999999999
phases.0.images={_LONG}
phases.0.batch=0
phases.0.batch=-1
phases.0.batch=2.5
phases.0.batch=1e30
phases.0.mask=1
phases.0.mask=-0.1
phases.0.mask=nan
phases.0.size=31
phases.0.size=0
phases.0.size=-32
phases.0.name=a b
phases.0.name=
phases.0.warmup=1e12
phases.0.schedule=wild
phases.0.final=2
phases.0.objective.p_mean=0
phases.0.ema.decays=[]
phases.0.ema.decays=[1.0]
phases.0.mask={{start: 0.5, end: 0.1, steps: 1}}
phases.1.name=masked
seed=-1
seed=1e30
seed=half
seed=2024-99-99
seed={_LONG}
name=
name=a/b
name=..
model.depth=0
model.depth=-1
model.depth=deep
model.depth=1000000000
model.text_depth=123456789012345678901234567890
model.depht=1
model.hidden_size=3200000000
model.hidden_size=32000000000000000000000
model.mlp_ratio=1e300
model.qkv_ratio=1e30
model.multiple_of=1000000000000000000000000
model.num_experts=1000000000
model.hidden_size=100
model.hidden_size=0
model.hidden_size=1e30
model.head_dim=7
model.head_dim=0
model.patch_size=0
model.patch_size=5
model.num_experts=-1
model.kind=unet
model.positions=none
model.mlp_ratio=[]
model.mlp_ratio=[0]
objective.kind=nonsense
objective.kind=
objective.p_mean=1
objective.scale=0
optimizer.kind=sgd
optimizer.betas=[0.9]
optimizer.betas=[0.9, 1.0]
optimizer.lr_ratio=-1
optimizer.expert_lr_ratio=2
ema.decays=[]
ema.decays=[0]
ema.decays=0.9
ema=1
train.threads=0
train.threads=-2
train.keep=0
train.keep_every=0
train.checkpoint_every=0
train.log_every=-1
train.spike=1
train.dtype=float64
train.trackers=[carrier_pigeon]
train.preview_prompts=[]
train.preview_prompts=['']
train.microbatch=0
train.grad_clip=0
parallel.kind=ring
parallel.shard=2
parallel={{kind: fsdp2, shard: 0}}
sampling.scheduler=nonsense
sampling.steps=0
sampling.guidance=-1
sampling.shift=0
evaluation.loss_levels=[]
evaluation.seeds=0
data.caption_drop=1
data.scenes.images=0
data.scenes.level=hard
data.scenes.size=7
data.scenes.size=100000
data.scenes.held_out=0
data=
data.max_tokens=0
data.max_tokens=1000000000000000000000000
base=demo
system=unet
"""

_ENCODE = """
encode nowhere --out new
encode '' --out new
encode pictures --out ''
encode pictures --out run
encode pictures --out pictures
encode pictures --out pictures/000.png
encode pictures --out pictures/000.png/deeper
encode pictures --out store --size 24
encode pictures --out store --held-out 3
encode pictures --out new --size 0
encode pictures --out new --size -16
encode pictures --out new --size 4000
encode pictures --out new --held-out -1
encode pictures --out new --size 16 --held-out 12
encode pictures --out new --size 16 --held-out 1000000
encode pictures --out new --chunk-rows 0
encode pictures --out new --chunk-rows -5
encode pictures --out new --max-bad 2
encode pictures --out new --max-bad -1
encode pictures --out new --max-bad nan
encode pictures --out new --max-tokens 0 --size 16
encode pictures --out new --max-tokens -1
encode pictures --out new --worker 4/4
encode pictures --out new --worker 1
encode pictures --out new --worker 0/0
encode pictures --out new --worker -1/2
encode pictures --out new --worker a/b
encode pictures --out new --device tpu
encode pictures --out new --device cuda:99
encode pictures --out new --pad some
encode pictures --out new --text-dtype int4
encode pictures --out new --autoencoder nowhere
encode pictures --out new --autoencoder pictures
encode pictures --out new --text-encoder nowhere
encode pictures --out new --text-encoder pictures
encode pictures --out new --log-variance
encode pictures --out new --image-column x
encode pictures --out new --caption-column x
encode pictures --out new --level cells
encode pictures --out new --images 5
encode pictures --out new --seed 5
encode pictures/000.txt --out new
encode pictures/000.png --out new
encode run --out new
encode store --out new
encode scenes --out new --level hard
encode scenes --out new --images 0
encode scenes --out new --images -1
encode scenes --out new --images 8 --size 7
encode scenes --out new --images 8 --size 100000
encode scenes --out new --images 8 --seed -1
encode scenes --out new --images 8 --split train
encode table --out new --split nonsense
encode table --out new --image-column nonsense
encode table --out new --caption-column nonsense
"""

_STORE = """
store info nowhere
store info pictures
store info pictures/000.png
store info run
store info ''
store info nonsense://there
store info file:///nowhere
store verify nowhere
store verify pictures
store verify run
store add nowhere --size 8
store add pictures --size 8
store add store
store add store --size 0
store add store --size 16
store add store --size 4000
store add store nowhere --size 8
store add store run --size 8
store add store --caption-column nonsense
store add store --text-encoder nowhere
store add store --name x
store add store --worker 2/2 --size 8
store copy nowhere new
store copy pictures new
store copy store pictures
store copy store run
store copy store pictures/000.png
"""

_SAMPLE = """
sample nowhere x --out new
sample pictures x --out new
sample pictures/000.png x --out new
sample store x --out new
sample '' x --out new
sample other/one x --out new
sample run x --out pictures/000.png
sample run x --out new --steps 0
sample run x --out new --steps -1
sample run x --out new --guidance -1
sample run x --out new --guidance nan
sample run x --out new --guidance inf
sample run x --out new --scheduler nonsense
sample run x --out new --scheduler edm_heun
sample run x --out new --device tpu
sample run x --out new --seed 99999999999999999999999
"""

_RUNS = """
evaluate nowhere
evaluate pictures
evaluate store
evaluate run/recipe.yaml
evaluate run --device tpu
evaluate run --steps 0
evaluate run --guidance nan
report nowhere
report pictures
report run/recipe.yaml
report store
compare run nowhere
compare nowhere nowhere
compare run pictures
compare run run/recipe.yaml
compare run run --out pictures
recipes nonsense
recipes pictures
recipes demo --set nonsense=1
recipes demo --set
demo --set nonsense=1
demo --set phases.0.lr=-1
demo --name a/b
demo --device tpu
"""

_CONVERT = """
convert nowhere new
convert pictures new
convert pictures/000.png new
convert pictures/000.txt new
convert run/recipe.yaml new
convert run new.zip
convert run/pipeline pictures
convert run/pipeline pictures/000.png/x.pt
convert store new
convert '' new
convert run ''
"""

_RECIPES: tuple[Content, ...] = (
    "",
    "\0",
    "null",
    "5",
    "[]",
    "[1, 2]",
    "name: x",
    "base: nothing",
    "base: own.yaml",
    "base: [demo]",
    "base: 5",
    "base: demo\nbase: demo\nname: [x]",
    "base: demo\nname: a\nname: b",
    "base: demo\n\tname: x",
    "base: demo\nname: 'x",
    "base: demo\nphases: {9: {lr: 1}}",
    "base: demo\nphases: {-1: {lr: 1}}",
    "base: demo\nphases: {x: {lr: 1}}",
    "base: demo\nphases: [null]",
    "base: demo\nmodel: [depth]",
    "base: demo\nmodel: null",
    "base: demo\n1: 2",
    "base: demo\ntrue: 2",
    "base: demo\n? [a, b]\n: 1",
    "base: demo\nname: !!python/object/apply:os.system ['touch owned']",
    "base: demo\nname: !nonsense x",
    "base: demo\nseed: &a [*a]",
    "base: demo\nname: *nothing",
    "base: demo\nmodel: &m {depth: 1, text_depth: *m}",
    "base: demo\nseed: 2024-01-01",
    "base: demo\n<<: 5",
    f"base: demo\nseed: {_LONG}",
    f"seed: {_DEEP}",
    "%YAML 9.9\n---\nbase: demo",
    "---\nbase: demo\n---\nbase: demo",
    b"\xff\xfe\x00base: demo",
    b"base: demo\nname: \xff",
    None,
)

_NOT_JSON: tuple[Content, ...] = (
    "",
    "\0\0\0",
    "null",
    "5",
    "[]",
    "{}",
    '""',
    '{"format"',
    '{"format": null}',
    '{"format": 1}',
    '{"format": 99, "shoestring": "9.9"}',
    '{"format": "two"}',
    '{"format": NaN}',
    f'{{"format": {_LONG}}}',
    _DEEP,
    b"\xff\xfe",
    None,
)

_PLACES = (
    Mistake("encode empty --out new", {"empty": None}),
    Mistake("encode --size 16 odd --out new", {"odd/0.png": b"", "odd/0.txt": "a caption"}),
    Mistake(
        "encode --size 16 odd --out new", {"odd/0.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "odd/0.txt": "x"}
    ),
    Mistake(
        "encode --size 16 odd --out new", {"odd/0.jpg": b"\xff\xd8\xff\xe0" + b"junk" * 9, "odd/0.txt": "x"}
    ),
    Mistake("encode --size 16 odd --out new", {"odd/0.png": "this is text", "odd/0.txt": "x"}),
    Mistake("encode --size 16 odd --out new", {"odd/0.txt": "a caption without a picture"}),
    Mistake("encode --size 16 odd.tar --out new", {"odd.tar": b""}),
    Mistake("encode --size 16 odd.tar --out new", {"odd.tar": b"junk" * 500}),
    Mistake("encode --size 16 odd.tar --out new", {"odd.tar": None}),
    Mistake("encode --size 16 odd.parquet --out new", {"odd.parquet": b""}),
    Mistake("encode --size 16 odd.parquet --out new", {"odd.parquet": b"PAR1junkPAR1"}),
    Mistake("encode --size 16 odd --out new", {"odd/0.png": b"", "odd/metadata.csv": "a,b\n1"}),
    Mistake(
        "encode --size 16 odd --out new",
        {"odd/metadata.jsonl": '{"file_name": "../../etc/passwd", "text": "x"}'},
    ),
    Mistake("encode --size 16 odd --out new", {"odd/metadata.jsonl": '{"file_name": 5, "text": "x"}'}),
    Mistake(
        "encode --size 16 odd --out new", {"odd/metadata.jsonl": '{"file_name": "0.png", "text": {"a": 1}}'}
    ),
    Mistake("encode --size 16 odd --out new", {"odd/metadata.parquet": b"PAR1"}),
    Mistake("encode pictures --out new", {"new/something.txt": "mine"}),
    Mistake("encode pictures --out new", {"new": "a file"}),
    Mistake("encode pictures --out new/deeper", {"new": "a file"}),
    Mistake("train quick.yaml --runs new", {"new": "a file"}),
    Mistake("train quick.yaml --set data.store=store --runs new", {"new/faults": "a file"}),
    Mistake("train own.yaml --dry-run", {"own.yaml": "base: ./other.yaml", "other.yaml": "base: own.yaml"}),
    Mistake("convert odd.pt new", {"odd.pt": b""}),
    Mistake("convert odd.pt new", {"odd.pt": b"junk" * 99}),
    Mistake("convert odd.pt new", {"odd.pt": b"PK\x03\x04" + b"junk" * 99}),
    Mistake(
        "convert odd.pt new",
        {"odd.pt": b"\x80\x02cos\nsystem\nq\x00X\x0b\x00\x00\x00touch ownedq\x01\x85q\x02R."},
    ),
    Mistake("convert odd.safetensors new", {"odd.safetensors": b""}),
    Mistake("convert odd.safetensors new", {"odd.safetensors": b"\x02\0\0\0\0\0\0\0{}"}),
    Mistake("convert odd.safetensors new", {"odd.safetensors": b"\xff" * 8 + b"{}"}),
    Mistake("convert odd new", {"odd": None}),
    Mistake("sample odd x", {"odd": None}),
    Mistake("sample odd x", {"odd/model_index.json": '{"_class_name": "os"}'}),
    Mistake("sample odd x", {"odd/model_index.json": '{"_class_name": ["os", "system"]}'}),
    Mistake("sample odd x", {"odd/model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}),
    Mistake("sample run x", {"run/pipeline/transformer/diffusion_pytorch_model.safetensors": b""}),
    Mistake("sample run x", {"run/pipeline/transformer/diffusion_pytorch_model.safetensors": b"junk" * 99}),
    Mistake("sample run x", {"run/pipeline": "a file"}),
    Mistake("evaluate odd", {"odd/recipe.yaml": "nonsense"}),
    Mistake("evaluate odd", {"odd/recipe.yaml": "base: demo"}),
    Mistake("report odd", {"odd/recipe.yaml": None}),
    Mistake("train run --resume", {"run/checkpoints": "a file"}),
)
