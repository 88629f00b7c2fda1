"""`moe launch --dry-run`: hosts, each launcher's commands, what is refused; nothing that was typed reaches a shell unquoted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moe.cli import app
from moe.launch import kubernetes
from moe.launch.hosts import Host, parse_nodes, read_hostfile
from moe.launch.many import command_of_this_machine, run_all
from moe.launch.plans import ON_THIS_MACHINE, PLANS, Command, Job

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "multi-node.yaml")
NASTY = 'train.sample_prompt=it\'s "$(touch owned)" `touch owned`; touch owned'


def dry_run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["launch", RECIPE, "--dry-run", *arguments])
    return result.exit_code, result.stdout, result.stderr


def plan(*arguments: str) -> dict[str, list[str]]:
    """Words of each host's command, as a shell would split the printed line."""
    status, out, err = dry_run(*arguments)
    assert status == 0, err
    lines = [line.partition(": ") for line in out.splitlines()]
    return {host: shlex.split(line) for host, _, line in lines}


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# machines\nnode0 slots=8\n\nuser@node1   slots=4 # the small one\n")
    return str(path)


def test_hostfile(hostfile: str) -> None:
    assert read_hostfile(Path(hostfile)) == [Host(name="node0", slots=8), Host(name="user@node1", slots=4)]
    assert read_hostfile(Path(hostfile))[1].address == "node1"
    assert read_hostfile(ROOT / "launch" / "hostfile.example")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node0", r"line 1: 'node0' must read NAME slots=N"),
        ("a slots=1\nb slots=x", "line 2"),
        ("a slots=0", "slots=0; give it at least 1"),
        ("a slots=1\na slots=1", "names a twice"),
        ("-lroot slots=1", "'-lroot' is no host name"),
        ("a;b slots=1", "'a;b' is no host name"),
    ],
)
def test_a_wrong_hostfile_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_torchrun_with_fixed_ranks(hostfile: str) -> None:
    found = plan("--hostfile", hostfile, "--launcher", "torchrun", "parallel.ep_size=4", "train.batch_size=480")
    assert list(found) == ["node0", "user@node1"]
    for index, (words, slots) in enumerate(zip(found.values(), ("8", "4"), strict=True)):
        assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
        assert after(words, "--node-rank") == str(index)
        assert after(words, "--nnodes") == "2" and after(words, "--nproc-per-node") == slots
        assert after(words, "--master-addr") == "node0" and after(words, "--master-port") == "29500"
        assert words[words.index("moe.launch.train") :][1:] == [RECIPE, "parallel.ep_size=4", "train.batch_size=480"]


def test_torchrun_that_survives_losses_resumes_by_itself() -> None:
    options = ["--nodes", "a,b,c,d", "--min-nodes", "2", "--port", "29501", "parallel.max_restarts=3", "--env", "A=b c"]
    found = plan("--launcher", "torchrun", *options)
    for index, words in enumerate(found.values()):
        assert words[:2] == ["env", "A=b c"]
        assert after(words, "--nnodes") == "2:4" and after(words, "--max-restarts") == "3"
        assert after(words, "--rdzv-endpoint") == "a:29501" and after(words, "--rdzv-backend") == "c10d"
        assert after(words, "--rdzv-conf") == f"is_host={int(index == 0)}"
        assert words[-1] == "--resume"


def test_ssh_runs_the_same_words_over_there(tmp_path: Path) -> None:
    """The shell at the other end gets back exactly what was typed: a real one splits it here."""
    options = ["--nodes", "a,user@b", NASTY, "--env", "X=$(touch owned)"]
    found = plan(*options, "--ssh-config", "my config")
    plain = plan(*options, "--launcher", "torchrun")
    for host, words in found.items():
        assert words[0] == "ssh" and after(words, "-F") == "my config" and after(words, "--") == host
        inner = words[-1].removeprefix(f"cd {shlex.quote(os.getcwd())} && exec ")
        shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {inner}"], cwd=tmp_path, capture_output=True, text=True)
        got = shown.stdout.splitlines()
        expected = plain[host]
        remote = [sys.executable, "-m", "moe.launch.remote"]
        assert got == [*expected[:2], *remote, *expected[2:]]
    assert not (tmp_path / "owned").exists()


def test_deepspeed(hostfile: str) -> None:
    settings = ["parallel.ep_size=4", "train.batch_size=480"]
    found = plan("--hostfile", hostfile, "--launcher", "deepspeed", *settings)
    words = found[ON_THIS_MACHINE]
    assert after(words, "--hostfile") == hostfile and after(words, "--master_addr") == "node0"
    assert words[words.index("--module") + 1 :] == ["moe.launch.train", RECIPE, *settings]


def test_slurm(hostfile: str) -> None:
    words = plan("--nodes", "a,b", "--launcher", "slurm")[ON_THIS_MACHINE]
    assert after(words, "--nodelist") == "a,b" and after(words, "--nodes") == "2"
    assert "PROCESSES=8" in words and "PROCESSES" in after(words, "--export").split(",")
    assert words[-2:] == [str(ROOT / "launch" / "train.slurm"), RECIPE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the machines either as --nodes a,b,c or as --hostfile FILE"),
        (["--nodes", "a,b", "--launcher", "slrum"], "--launcher 'slrum' is unknown; did you mean 'slurm'?"),
        (["--nodes", "a,b", "parallel.processes=auto"], "parallel.processes=auto counts the GPUs of this machine"),
        (["--nodes", "a,b", "--min-nodes", "3"], "--min-nodes 3 is more than the 2 hosts"),
        (["--nodes", "a,b,c"], "train.batch_size=512 is not divisible by"),
        (["--nodes", "a", "parallel.ep_size=16", "parallel.processes=8"], "parallel.ep_size=16 does not divide"),
        (["--nodes", "a,b", "--env", "1A=3"], "--env 1A=3 must read NAME=VALUE"),
        (["--nodes", "a,b", "--launcher", "deepspeed"], "give --hostfile instead of --nodes"),
        (["--hostfile", "none"], "hostfile 'none' does not exist"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    status, _, err = dry_run(*arguments)
    assert status == 2 and message in " ".join(err.split())


@pytest.mark.parametrize(
    "option", [NASTY, "train.sample_prompt=$HOME", "parallel.max_restarts=1", "--env=NCCL_DEBUG=INFO"]
)
def test_what_deepspeed_cannot_pass_on_is_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "hostfile").write_text("a slots=8\n")
    status, _, err = dry_run("--hostfile", str(tmp_path / "hostfile"), "--launcher", "deepspeed", option)
    assert status == 2 and "--launcher deepspeed" in err


# --- which of the machines this one is


def test_this_machine_is_found_by_name_or_said() -> None:
    import socket

    hosts = parse_nodes(f"elsewhere.invalid,{socket.gethostname()}", 1)
    commands = [Command(host=host.name, arguments=[host.name], environment={}) for host in hosts]
    assert command_of_this_machine(commands, hosts, None) is commands[1]
    assert command_of_this_machine(commands, hosts, "elsewhere.invalid") is commands[0]
    with pytest.raises(ValueError, match=r"none of the hosts .*; say which with --this-host"):
        command_of_this_machine(commands[:1], hosts[:1], None)


# --- running a plan; programs that end at once stand in for ssh


def small(host: str, program: str) -> Command:
    followed = [sys.executable, "-m", "moe.launch.remote", sys.executable, "-c", program]
    return Command(host=host, arguments=followed, environment={})


LONG = "import time; time.sleep(60)"


def test_all_machines_end_when_one_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_all([small("a", LONG), small("b", "raise SystemExit(7)")], min_nodes=2) == 7
    assert "b ended with status 7" in capfd.readouterr().err


def test_an_elastic_run_goes_on_without_a_machine() -> None:
    assert run_all([small("a", "import time; time.sleep(1)"), small("b", "raise SystemExit(7)")], min_nodes=1) == 0
    assert run_all([small("a", "raise SystemExit(5)"), small("b", "raise SystemExit(5)")], min_nodes=1) == 5


def test_a_remote_command_ends_with_its_launcher(tmp_path: Path) -> None:
    """SIGKILL to who holds the input closes it, and the command is asked to stop."""
    program = (
        f"import signal, sys, time, pathlib; f = pathlib.Path({str(tmp_path)!r}, 'asked')\n"
        "signal.signal(signal.SIGTERM, lambda *_: (f.write_text('yes'), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-m", "moe.launch.remote", sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "asked").read_text() == "yes"


# --- Slurm's script, with programs of its names that only write down what they are given


def test_the_slurm_script_hands_on_what_it_was_given(tmp_path: Path) -> None:
    for name, body in {
        "scontrol": "echo node7; echo node8",
        "srun": 'printf "%s\\n" "$@" "NODES=$NODES" "HEAD=$HEAD" "PROCESSES=$PROCESSES" "RUN_ID=$RUN_ID"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "42",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_GPUS_ON_NODE": "8",
    }
    script = [str(ROOT / "launch" / "train.slurm"), "a.yaml", "name=x y"]

    def said(**more: str) -> list[str]:
        done = subprocess.run(["bash", *script], env={**variables, **more}, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    ends = ["NODES=2", "HEAD=node7:29500", "PROCESSES=8", "RUN_ID=42"]
    program = str(ROOT / "launch" / "many_nodes.sh")
    assert said() == ["--kill-on-bad-exit=1", program, "a.yaml", "name=x y", *ends]
    assert said(MAX_RESTARTS="2") == [program, "a.yaml", "name=x y", "--resume", *ends]


# --- the Kubernetes manifest


def job(**values: Any) -> Job:
    hosts = [Host(name=f"n{i}", slots=4) for i in range(3)]
    plain = {
        "name": "My_Run.1",
        "hosts": hosts,
        "arguments": ["c.yaml", "x=$(A)"],
        "directory": Path("/"),
        "min_nodes": 3,
    }
    return Job(**{**plain, **values})


def test_the_manifest_names_one_pod_per_machine_and_meets_at_the_first() -> None:
    values = kubernetes.manifest(job(max_restarts=2, min_nodes=2, port=1234, environment={"A": "1"}))
    spec = values["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert values["metadata"]["name"] == "my-run-1"
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (3, 3, "Indexed")
    arguments = container["args"]
    assert arguments[arguments.index("moe.launch.train") + 1 :] == ["c.yaml", "x=$$(A)", "--resume"]
    assert {"--nnodes=2:3", "--nproc-per-node=4", "--max-restarts=2"} < set(arguments)
    # JobSet's name of the first pod: JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN, the subdomain being the JobSet's name
    assert "--rdzv-endpoint=my-run-1-node-0-0.my-run-1:1234" in arguments
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert {"name": "A", "value": "1"} in container["env"]
    assert kubernetes.manifest(job(), "cpu")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]["resources"] == {"limits": {}}


def test_the_template_is_the_manifest_of_its_recipe() -> None:
    """What stands in the repository can be applied as it is."""
    template = yaml.safe_load(kubernetes.TEMPLATE.read_text())
    hosts = [Host(name=f"n{i}", slots=8) for i in range(4)]
    made = kubernetes.manifest(
        job(name="moe", hosts=hosts, min_nodes=4, arguments=["configs/multi-node.yaml"], max_restarts=3)
    )
    assert made == template


def test_the_manifest_is_printed_whole() -> None:
    status, out, err = dry_run("--nodes", "4", "--launcher", "kubernetes", "--image", "registry/x:1")
    assert status == 0, err
    values = yaml.safe_load(out)
    assert values["kind"] == "JobSet" and "registry/x:1" in out


def test_every_launcher_has_a_plan() -> None:
    assert PLANS.keys() == {"torchrun", "ssh", "deepspeed", "slurm"}
