"""`accelerate launch`, torchrun and the Slurm script of docs/cluster.md start the same run: real launchers, real processes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import killing
import pytest
import yaml
from world import free_port

from ftk.train.hooks.recorder import read_metrics

pytestmark = pytest.mark.faults

TRAIN = {
    "steps": 4, "global_batch_size": 12, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
    "checkpoint_every": 100, "seed": 5, "log_every": 4, "trackers": [],
}  # fmt: skip
RANK = """
# Stands for ftk, which takes seconds to import: has the test train with this environment and these arguments, and ends as that.
import json, os, sys, time
from pathlib import Path
asked, code = (Path("asked", os.environ["RANK"] + suffix) for suffix in (".json", ".code"))
arguments = [os.path.abspath(each) if os.path.exists(each) else each for each in sys.argv[1:]]
asked.with_suffix(".part").write_text(json.dumps([arguments, dict(os.environ)]))
asked.with_suffix(".part").rename(asked)
while not code.exists():
    time.sleep(0.01)
sys.exit(int(code.read_text()))
"""
GUIDE = Path(__file__).parents[2] / "docs/cluster.md"
SRUN = """#!/bin/bash
# Stands for srun: starts the command once per task and ends with the highest exit code.
[ "$1" = "--kill-on-bad-exit=0" ] && shift
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks="$tasks $!"
done
highest=0
for task in $tasks; do
    wait "$task"
    code=$?
    if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
# Stands for scontrol: knows one host, and notes which job is queued again.
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol.calls; fi
"""


def launch(command: list[object], folder: Path, **environment: str) -> subprocess.Popen[str]:
    # The test's own environment may come from a launcher.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [str(part) for part in command], cwd=folder, env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code, the output and the messages of a launcher."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def train_for_two(process: subprocess.Popen[str], folder: Path) -> None:
    """Train in two forks with the environments that a launcher gave its processes, which stand still in `RANK` meanwhile."""
    asked = [folder / f"asked/{rank}.json" for rank in (0, 1)]
    while not all(path.exists() for path in asked):
        assert process.poll() is None, ended(process)
        time.sleep(0.01)
    runs = []
    for path in asked:
        arguments, environment = json.loads(path.read_text())
        runs.append(killing.server().start(*arguments, environment=environment))
    codes = [run.wait() for run in runs]
    for path, code in zip(asked, codes, strict=True):
        path.unlink()
        path.with_suffix(".part").write_text(str(code))
        path.with_suffix(".part").rename(path.with_suffix(".code"))
    code, _, err = ended(process)
    assert (codes, code) == ([0, 0], 0), err + "".join(run.err for run in runs)
    for path in asked:
        path.with_suffix(".code").unlink()


def slurm(folder: Path, ftk: str) -> subprocess.Popen[str]:
    """Run the guide's script with two tasks; `ftk` is the shell script that stands where the command is installed."""
    (script,) = [block for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "SBATCH" in block]
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ftk", ftk)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    while not 20000 <= (port := free_port()) < 40000:
        pass
    return launch(
        ["bash", "job.sh"], folder, PATH=f"{programs}:{os.environ['PATH']}", SLURM_NTASKS="2",
        SLURM_JOB_NODELIST="here", SLURM_JOB_ID=str(port - 20000),
    )  # fmt: skip


def test_every_launcher_starts_the_run_that_one_process_computes(cached, ftk, tmp_path):
    run_file = cached(train=TRAIN)
    settings = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "mixed_precision": "no",
        "num_machines": 1, "machine_rank": 0, "num_processes": 2, "main_process_port": free_port(),
    }  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "asked").mkdir()
    train = ["rank.py", "train", "run.yaml", "--set"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    train_for_two(launch([*accelerate, *train, "run=accelerate"], tmp_path), tmp_path)
    train_for_two(launch([*torchrun, *train, "run=torchrun"], tmp_path), tmp_path)
    train_for_two(slurm(tmp_path, f'#!/bin/bash\nexec {sys.executable} rank.py "$@"\n'), tmp_path)
    assert ftk("train", run_file, "--set", "run=alone").code == 0
    losses = {
        name: [row["loss"] for row in read_metrics(tmp_path / "work/runs" / name)]
        for name in ("accelerate", "torchrun", "test", "alone")
    }
    assert len(losses["alone"]) == 4
    assert losses["accelerate"] == losses["torchrun"] == losses["test"]
    assert losses["test"] == pytest.approx(losses["alone"], rel=1e-6)
    for name in ("accelerate", "torchrun", "test"):
        environment = yaml.safe_load((tmp_path / "work/runs" / name / "environment.json").read_text())
        assert environment["num_processes"] == 2
    assert not (tmp_path / "scontrol.calls").exists()


def test_the_settings_of_accelerates_file_reach_the_run(tmp_path):
    settings = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "mixed_precision": "bf16",
        "num_machines": 1, "machine_rank": 0, "num_processes": 1,
    }  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    tree = {
        "run": "r",
        "model": {"family": "f", "path": "p"},
        "data": {"sources": [{"path": "p"}]},
        "train": {"precision": "auto"},
    }
    (tmp_path / "asked.py").write_text(
        "from ftk.configs.schema import RunConfig\n"
        "from ftk.train import launch\n"
        f"train = launch.applied(RunConfig.model_validate({tree})).train\n"
        "print(train.precision, train.device)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml", "asked.py"]
    code, out, err = ended(launch(command, tmp_path))
    assert (code, out) == (0, "bf16 cpu\n"), err


def test_the_slurm_script_queues_a_stopped_run_again(tmp_path):
    code, out, _ = ended(slurm(tmp_path, '#!/bin/bash\necho "$RANK of $WORLD_SIZE at $MASTER_ADDR: $@"\nexit 75\n'))
    assert code == 75
    assert sorted(out.splitlines()) == [f"{rank} of 2 at 127.0.0.1: train run.yaml" for rank in (0, 1)]
    assert re.fullmatch(r"requeue \d+\n", (tmp_path / "scontrol.calls").read_text())


def test_the_slurm_script_queues_a_run_with_a_mistake_no_more(tmp_path):
    assert ended(slurm(tmp_path, "#!/bin/bash\nexit 2\n"))[0] == 2
    assert not (tmp_path / "scontrol.calls").exists()
