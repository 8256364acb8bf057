"""Every command, key and code block of README, docs, scripts and presets is composed, parsed or compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.documents import DOCUMENTS, PRESETS, SCRIPTS, Piece, Workshop, pieces


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS, *PRESETS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_written_there_is_wrong(path: Path, workshop: Workshop) -> None:
    assert [problem for piece in pieces(path) if (problem := workshop.problem(piece))] == []


def test_the_pieces_are_found() -> None:
    """A reader that finds nothing would find nothing wrong."""
    readme = pieces(ROOT / "README.md")
    assert sum(piece.kind == "command" for piece in readme) >= 20
    assert sum(piece.kind == "key" for piece in readme) >= 20
    assert sum(piece.kind == "python" for piece in readme) == 1
    for name, count in {
        "launch/local.sh": 1,
        "launch/test.sh": 1,
        "launch/multinode.sh": 2,
        "slurm/train.sbatch": 2,
    }.items():
        assert len(pieces(ROOT / name)) >= count, name
    presets = [piece for path in PRESETS for piece in pieces(path)]
    assert {piece.where.partition(":")[0] for piece in presets} >= {"lora.yaml", "full.yaml", "llama8b.yaml"}
    text = "".join(path.read_text() for path in PRESETS)
    assert len(presets) == text.count("sftdist train") + text.count("torchrun"), "each mention is one"


WRONG = [
    ("sftdist trian +exp=quickstart", "there is no command trian"),
    ("sftdist train +exp=quickstrat", "exit code 2"),
    ("sftdist train +exp=quickstart optimizer.learning_rate=1", "exit code 2"),
    ("sftdist train -m +exp=quickstart optimizer.lr=1e-4,fast", "exit code 2"),
    ("sftdist train -m hydra/launcher=torchrum +exp=quickstart", "exit code 2"),
    ("sftdist train +data.mix={domain:0.6,general:0.3,format:0.1}", "exit code 2"),
    ("sftdist plan +exp=llama8b cluster.gpu=8", "exit code 2"),
    ("sftdist export run.dir=runs/none step=best", "exit code 2"),
    ("sftdist runs checkpoints R --quick", "exit code 2"),
    ("sftdist pipeline +exp=quickstart data.maxlen=3", "unknown key; did you mean data.max_len?"),
    ("torchrun --nproc-per-rank 2 -m sftdist.train +exp=quickstart", "no command line of torchrun"),
    ("torchrun --nproc-per-node 2 -m sftdist.train +exp=quickstart trian.epochs=1", "exit code 2"),
    ("torchrun --nproc-per-node 2 train.py", "required -m sftdist.COMMAND"),
    ("python benchmarks/quickstrat.py", "there is no file"),
    ("python benchmarks/quickstart.py --no-such-option", "has no --no-such-option"),
    ("python -m sftdist.trian +exp=quickstart", "there is no command trian"),
    ("python -m sftdist_is_not_there", "there is no module"),
    ("bash launch/tests.sh", "there is no file"),
    ("bash launch/test.sh everything", "has no everything"),
    ("bash launch/local.sh +exp=quickstart lr=1", "exit code 2"),
    ("bash launch/multinode.sh --hosts 2 +exp=quickstart", "has no --hosts"),
    ("sbatch --node=2 slurm/train.sbatch +exp=quickstart", "does not know sbatch's --node"),
    ("sbatch slurm/train.sbatch +exp=quickstart zero.stage=7", "exit code 2"),
    ("sbatch slurm/trian.sbatch +exp=quickstart", "there is no file"),
    ("sbatch --array=0-N slurm/sweep.sbatch FOLDER seed=1", "required one folder"),
    ("pip install 'sftdist[flsh]'", "there is no extra flsh"),
    ("docker build -f launch/Dockerfle -t sftdist .", "required docker build"),
    ("docker run --gpu all sftdist doctor", "does not know docker's --gpu"),
    ("docker run --rm sftdist trian +exp=quickstart", "there is no command trian"),
    ("apptainer build sftdist.sif launch/sftdist.deff", "required apptainer build"),
    ("apptainer exec --nv sftdist.sif sftdist train +exp=quickstrat", "exit code 2"),
    ("pytest tests/numeric", "there is no tests/numeric"),
    ("rm -rf runs", "does not know how to check 'rm'"),
    ("cd x && sftdist trian +exp=x", "there is no command trian"),
    ("sftdist train +exp=quickstart 'run.note=a", "No closing quotation"),
]


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_a_wrong_line_is_caught(line: str, said: str, workshop: Workshop) -> None:
    problem = workshop.problem(Piece("README.md:1", "command", line))
    assert problem is not None
    assert said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```bash\nsftdist train +exp=lora \\\n    model.path=DIR data.trian=my.jsonl\n```\n", "data.trian"),
        ("See `sftdist train +exp=lroa`.", "exit code 2"),
        ("Set `checkpoint.every_step=3`.", "no such key"),
        ("Set `data.sources.mine.paths`.", "no such key"),
        ("```python\nfrom sftdist.core.config import compse\n```\n", "has no compse"),
        ("```python\nx = (1\n```\n", "never closed"),
        ("```yaml\na: [1\n```\n", "expected"),
        ("```fish\nls\n```\n", "unknown kind"),
    ],
)
def test_a_wrong_piece_of_a_document_is_caught(text: str, said: str, workshop: Workshop) -> None:
    (piece,) = pieces(Path("README.md"), f"# Title\n\n{text}\n")
    problem = workshop.problem(piece)
    assert problem is not None
    assert said in problem


def test_right_lines_pass(workshop: Workshop) -> None:
    right = [
        "sftdist train -m +exp=quickstart '+data.mix={domain:1,general:1,format:5},[1,2,3],balanced' optimizer.lr=1,2",
        "sftdist train -m hydra/launcher=torchrun parallel=2 +exp=quickstart seed=1,2",
        "NODES=2 ADDRESS=HOST:PORT bash launch/multinode.sh --node-rank 0 +exp=NAME [KEY=VALUE ...]",
        "torchrun ... -m sftdist.train -m ...",
        "sftdist runs checkpoints R --fast && sftdist export run.dir=R step=best",
        "sftdist train  # as such",
        "sftdist inspect +exp=quickstart >/dev/null",
    ]
    assert [problem for line in right if (problem := workshop.problem(Piece("a", "command", line)))] == []
