"""Notebooks in two rooms, with real kernels: what honest code means there, and what ends badly says so."""

import copy
import dataclasses
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell
from nbgrader.preprocessors import Execute
from traitlets.config import Config

from isolate import notebook as notebook_module
from isolate import rooms
from isolate.files import pack
from isolate.notebook import Ended, Execution, Kernel, Settings, execute
from isolate.policy import MIB, Limits, Policy, SandboxError

Run = Callable[..., Execution]


def text_of(execution: Execution, index: int = 0) -> str:
    return "".join(output.get("text", "") for output in execution.notebook.cells[index].outputs)


def errors_of(execution: Execution, index: int = 0) -> list[str]:
    return [output.ename for output in execution.notebook.cells[index].outputs if output.output_type == "error"]


def endings(execution: Execution) -> list[str]:
    return [str(ended) for ended in execution.report.cells.values()]


# What stock does, this does. One notebook for each side, compared cell by cell.

SAME: dict[str, str] = {
    "result": "1 + 1",
    "result and prints": "print('a'); print('b'); 'c'",
    "both streams": "import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr); sys.stderr.flush()",
    "nothing": "x = 1",
    "comment": "# nothing to do",
    "syntax error": "def f(:",
    "error": "1 / 0",
    "error after output": "print('before'); raise ValueError('text with ünïcödé and \\n a line')",
    "error without text": "assert False",
    "error from a function": "def f(n):\n    return f(n - 1) if n else 1 / n\nf(3)",
    "unicode": "print('äöü 日本語 🎉 \\u202e rtl'); '∑'",
    "control characters": "print('a\\rb\\x08c\\x1b[31mred\\x1b[0m\\x00')",
    "display": "from IPython.display import *\ndisplay(HTML('<b>x</b>'), Markdown('*x*'), JSON({'a': [1]}))",
    "display an image": "from IPython.display import Image\nImage(data=b'\\x89PNG\\r\\n\\x1a\\n' + bytes(20))",
    "display with metadata": "display({'text/plain': 'x'}, raw=True, metadata={'a': {'b': 1}})",
    "display ids": "h = display('one', display_id='i'); h.update('two')",
    "updated by a later cell": "h.update('three')",
    "clear output": "from IPython.display import clear_output\nprint('gone'); clear_output(); print('stays')",
    "clear output later": "print('gone'); clear_output(wait=True); print('stays')",
    "clear output, nothing after": "print('stays'); clear_output(wait=True)",
    "displayhook": "get_ipython().displayhook('x'); 'y'",
    "two results": "get_ipython().ast_node_interactivity = 'all'\n1\n2",
    "back to one": "get_ipython().ast_node_interactivity = 'last_expr'",
    "semicolon": "1;",
    "magics": "%env A=b\nimport os; os.environ['A']",
    "cell magic": "%%capture c\nprint('hidden')",
    "captured": "c.stdout",
    "shell": "!echo from the shell",
    "shell to a variable": "x = !echo one && echo two\nx",
    "bash": "%%bash\necho out\necho err >&2\nexit 3",
    "exit code of a shell": "!exit 4\n_exit_code",
    "help": "int.real?",
    "input": "input('name? ')",
    "getpass": "import getpass; getpass.getpass()",
    "sys.exit": "import sys; sys.exit(3)",
    "raise SystemExit": "raise SystemExit('words')",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "own exception": "class E(Exception):\n    def __str__(self): return 'mine'\nraise E",
    "exception whose text fails": "class F(Exception):\n    def __str__(self): 1 / 0\nraise F",
    "group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
    "repr fails": "class R:\n    def __repr__(self): raise ValueError('r')\nR()",
    "warning": "import warnings; warnings.warn('careful')",
    "logging": "import logging; logging.warning('careful')",
    "files": "open('made', 'w').write('x'); sorted(os.listdir('.'))",
    "chdir": "os.chdir('/tmp'); os.getcwd()",
    "threads": "import threading\nt = threading.Thread(target=lambda: print('thread')); t.start(); t.join()",
    "subprocess": "import subprocess; subprocess.run(['echo', 'x'], capture_output=True).stdout",
    "multiprocessing": "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: r = p.map(abs, [-1])\nr",
    "async": "import asyncio\nawait asyncio.sleep(0.01)\n'awaited'",
    "last expression": "_",
    "history": "In[-1]",
    "numpy": "import numpy as np; np.arange(6).reshape(2, 3)",
    "pandas": "import pandas as pd; pd.DataFrame({'a': [1, 2], 'b': ['x', 'ü']})",
    "showtraceback disabled": "get_ipython().showtraceback = lambda *a, **k: None\n1 / 0",
}


def without_numbers(text: str) -> str:
    """Process ids in file names, addresses and paths of the two work directories differ; nothing else may."""
    text = re.sub(r"ipykernel_\d+/\d+", "ipykernel_N/N", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0xN", text)
    return re.sub(r"\bpid=\d+|execute_request\.\w+", "N", text)


def comparable(cell: NotebookNode) -> list[Any]:
    """Neighbouring texts of one stream belong together: where they are parted is a matter of timing."""
    found: list[Any] = []
    for output in json.loads(without_numbers(json.dumps(cell.outputs))):
        if (
            found
            and output["output_type"] == "stream" == found[-1]["output_type"]
            and output["name"] == found[-1]["name"]
        ):
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NotebookNode]:
    """The same notebook through nbgrader's own Execute, without a sandbox."""

    def run(notebook: NotebookNode, **traits: Any) -> NotebookNode:
        config = Config()
        for name, value in traits.items():
            config.Execute[name] = value
        result = copy.deepcopy(notebook)
        resources = {"metadata": {"path": str(tmp_path_factory.mktemp("stock"))}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
            # what the sandbox has, too
            patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
            done, _ = Execute(config=config).preprocess(result, resources)
        return done

    return run


def both(
    stock: Callable[..., NotebookNode], kernel: Kernel, policy: Policy, sources: list[str], **settings: Any
) -> Any:
    """Both executions of these sources, and the first of the differences per cell."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    theirs = stock(notebook, **settings)
    ours = execute(notebook, kernel, dataclasses.replace(policy, limits=Limits(wall_seconds=120)), Settings(**settings))
    return theirs, ours


@pytest.fixture(scope="module")
def pair(stock: Callable[..., NotebookNode], kernel: Kernel, kernel_policy: Policy) -> Any:
    return both(stock, kernel, kernel_policy, list(SAME.values()))


class TestParity:
    @pytest.mark.parametrize("name", SAME)
    def test_outputs_are_those_of_stock(self, pair: Any, name: str) -> None:
        index = list(SAME).index(name)
        theirs, ours = pair[0].cells[index], pair[1].notebook.cells[index]
        assert comparable(ours) == comparable(theirs)
        assert ours.execution_count == theirs.execution_count

    def test_metadata_is_that_of_stock(self, pair: Any) -> None:
        theirs, ours = pair[0], pair[1].notebook
        assert ours.metadata["language_info"] == theirs.metadata["language_info"]
        for cell, other in zip(ours.cells, theirs.cells, strict=True):
            assert cell.source == other.source
            assert set(cell.metadata) == set(other.metadata)
            assert set(cell.metadata["execution"]) == set(other.metadata["execution"])

    def test_all_cells_ended_well(self, pair: Any) -> None:
        report = pair[1].report
        assert report.ended == "finished"
        assert set(report.cells.values()) == {Ended.OK}
        assert report.limits == ()

    @pytest.mark.slow
    def test_widgets(self, stock: Callable[..., NotebookNode], kernel: Kernel, kernel_policy: Policy) -> None:
        pytest.importorskip("ipywidgets")
        # Not `with Output():`, in which ipykernel 7 waits for its own flush now and then, without a sandbox as well.
        sources = [
            "import ipywidgets as w\ns = w.IntSlider(value=3); s",
            "t = w.Text('ü'); b = w.HBox([s, t]); b",
            "s.observe(lambda change: print(change.new), 'value'); s.value = 7",
        ]
        theirs, ours = both(stock, kernel, kernel_policy, sources)
        assert [comparable_types(cell) for cell in ours.notebook.cells] == [
            comparable_types(cell) for cell in theirs.cells
        ]
        assert models_of(ours.notebook) == models_of(theirs)

    def test_widget_state_can_be_left_out(self, run_cells: Run) -> None:
        pytest.importorskip("ipywidgets")
        execution = run_cells("import ipywidgets as w\nw.IntSlider()", settings=Settings(store_widget_state=False))
        assert "widgets" not in execution.notebook.metadata

    def test_coalesced_streams(self, run_cells: Run) -> None:
        code = "import sys\nfor i in range(3): print(i, end='\\r', flush=True), print('e', file=sys.stderr, flush=True)"
        outputs = run_cells(code, settings=Settings(coalesce_streams=True)).notebook.cells[0].outputs
        assert [(output.name, output.text) for output in outputs] == [("stdout", "2\r"), ("stderr", "e\ne\ne\n")]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "settings",
        [
            {"timeout": 1},
            {"timeout": 1, "error_on_timeout": {"ename": "Slow", "evalue": "too slow", "traceback": ["slow"]}},
            {"timeout": 1, "error_on_timeout": {}},
        ],
        ids=["default", "custom", "none"],
    )
    def test_timeouts(
        self, stock: Callable[..., NotebookNode], kernel: Kernel, kernel_policy: Policy, settings: dict[str, Any]
    ) -> None:
        sources = ["import time\nprint('start', flush=True)\ntime.sleep(60)", "'next'"]
        theirs, ours = both(stock, kernel, kernel_policy, sources, **settings)
        assert [comparable(cell) for cell in ours.notebook.cells] == [comparable(cell) for cell in theirs.cells]
        assert endings(ours) == ["timeout", "ok"]
        assert ours.report.limits == ("timeout",)
        assert ours.report.ended == "finished"


def models_of(notebook: NotebookNode) -> list[str]:
    """The widgets' models with their values; ids and the models that refer to each other by id aside."""
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    return sorted(f"{state['model_name']} {state['state'].get('value')!r}" for state in states)


def comparable_types(cell: NotebookNode) -> list[Any]:
    return [[output.output_type, sorted(output.get("data", {}))] for output in cell.outputs]


class TestSettings:
    def test_errors_that_are_not_allowed_stop_it(self, run_cells: Run) -> None:
        execution = run_cells("1 / 0", "'next'", settings=Settings(allow_errors=False))
        assert endings(execution) == ["stopped", "not run"]
        assert errors_of(execution, 0) == ["ZeroDivisionError"]
        assert errors_of(execution, 1) == ["NotRunError"]
        assert "cell 1" in execution.notebook.cells[1].outputs[0].evalue

    def test_errors_that_are_allowed_by_name(self, run_cells: Run) -> None:
        settings = Settings(allow_errors=False, allow_error_names=["ZeroDivisionError"])
        execution = run_cells("1 / 0", "[][0]", "'next'", settings=settings)
        assert endings(execution) == ["ok", "stopped", "not run"]

    def test_force_raise_errors(self, run_cells: Run) -> None:
        execution = run_cells("1 / 0", "'next'", settings=Settings(allow_errors=True, force_raise_errors=True))
        assert endings(execution) == ["stopped", "not run"]

    def test_a_students_tags_change_nothing(self, kernel: Kernel, kernel_policy: Policy) -> None:
        tags = ["skip-execution", "raises-exception"]
        notebook = new_notebook(cells=[new_code_cell("1 / 0", metadata={"tags": tags}), new_code_cell("2")])
        execution = execute(notebook, kernel, kernel_policy, Settings(allow_errors=False))
        assert endings(execution) == ["stopped", "not run"]
        assert execution.notebook.cells[0].metadata["tags"] == tags

    def test_timing_can_be_left_out(self, run_cells: Run) -> None:
        execution = run_cells("1", settings=Settings(record_timing=False))
        assert "execution" not in execution.notebook.cells[0].metadata

    @pytest.mark.slow
    def test_timeout_by_cell(self, run_cells: Run) -> None:
        sleep = "import time; time.sleep(1.5); 'slept'"
        execution = run_cells(sleep, sleep, sleep, settings=Settings(timeout=0.5), timeouts={1: None, 2: 30})
        assert endings(execution) == ["timeout", "ok", "ok"]

    @pytest.mark.slow
    def test_a_timeout_without_an_interrupt_ends_the_kernel(self, run_cells: Run) -> None:
        settings = Settings(timeout=0.5, interrupt_on_timeout=False)
        execution = run_cells("import time; time.sleep(60)", "'next'", settings=settings)
        assert endings(execution) == ["stuck", "not run"]
        assert errors_of(execution) == ["CellTimeoutError"]

    @pytest.mark.slow
    def test_a_cell_that_ignores_interrupts_is_killed_and_told_its_own_timeout(self, run_cells: Run) -> None:
        code = (
            "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('in', flush=True)\ntime.sleep(60)"
        )
        execution = run_cells("'before'", code, "'next'", timeouts={1: 0.5})
        assert endings(execution) == ["ok", "stuck", "not run"]
        assert execution.report.ended == "timeout"
        assert execution.report.limits == ("timeout",)
        assert execution.notebook.cells[0].outputs[0].data["text/plain"] == "'before'"
        assert text_of(execution, 1) == "in\n"
        assert "CellTimeoutError" in errors_of(execution, 1)
        assert "timeout of 0.5 s" in execution.notebook.cells[1].outputs[-1].evalue
        assert "cell 2" in execution.notebook.cells[2].outputs[0].evalue

    @pytest.mark.slow
    def test_an_interrupt_by_message(self, run_cells: Run, kernel: Kernel) -> None:
        execution = run_cells(
            "import time; time.sleep(60)",
            "'next'",
            kernel=dataclasses.replace(kernel, interrupt_mode="message"),
            settings=Settings(timeout=0.5),
        )
        assert endings(execution) == ["timeout", "ok"]
        assert "KeyboardInterrupt" in errors_of(execution)


class TestCells:
    def test_only_outputs_change(self, kernel: Kernel, kernel_policy: Policy) -> None:
        notebook = new_notebook(
            cells=[
                new_markdown_cell("# Title", attachments={"a.png": {"image/png": "aGk="}}, metadata={"x": 1}),
                new_code_cell(
                    "1", metadata={"nbgrader": {"grade": True}, "tags": ["a"]}, outputs=[], execution_count=9
                ),
                new_raw_cell("raw"),
                new_code_cell("   \n", execution_count=3),
            ],
            metadata={"mine": {"kept": True}},
        )
        before = copy.deepcopy(notebook)
        done = execute(notebook, kernel, kernel_policy).notebook
        assert notebook == before
        assert [done.cells[index] for index in (0, 2)] == [before.cells[index] for index in (0, 2)]
        assert done.cells[1].metadata["nbgrader"] == {"grade": True}
        assert (done.cells[1].id, done.cells[1].source) == (before.cells[1].id, "1")
        assert done.cells[1].execution_count == 1
        assert done.metadata["mine"] == {"kept": True}
        nbformat.validate(done)

    def test_old_outputs_never_stay(self, kernel: Kernel, kernel_policy: Policy) -> None:
        """nbgrader scores a cell with no error in full: what a student put there must not be what is scored."""
        forged = [nbformat.v4.new_output("execute_result", data={"text/plain": "10.0"}, execution_count=1)]
        cells = [
            new_code_cell(source, outputs=forged, execution_count=1)
            for source in ("x = 1", "import os; os._exit(0)", "1", " ")
        ]
        execution = execute(new_notebook(cells=cells), kernel, kernel_policy, skip={0})
        assert "10.0" not in json.dumps(execution.notebook)

    def test_skipped_cells_are_not_run(self, run_cells: Run) -> None:
        execution = run_cells("x = 1", "x = 2", "x", skip={1})
        assert execution.notebook.cells[2].outputs[0].data["text/plain"] == "1"
        assert execution.notebook.cells[1].outputs == []
        assert list(execution.report.cells) == [0, 2]

    @pytest.mark.parametrize("sources", [[], ["", " \n"]])
    def test_nothing_to_run(self, run_cells: Run, sources: list[str]) -> None:
        execution = run_cells(*sources)
        assert execution.report.ended == "finished"
        assert execution.report.cells == {}

    def test_progress(self, run_cells: Run) -> None:
        seen: list[tuple[int, str]] = []
        run_cells("1", "2", "3", skip={1}, progress=lambda index, state: seen.append((index, state)))
        assert seen == [(0, "started"), (0, "finished"), (2, "started"), (2, "finished")]

    def test_a_progress_that_fails_leaves_nothing(self, run_cells: Run) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ZeroDivisionError):
            run_cells("1", progress=lambda index, state: 1 / 0)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_no_descriptors_are_left(self, run_cells: Run) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        run_cells("1")
        with pytest.raises(SandboxError):
            run_cells("1", kernel=Kernel(["false"]))
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_the_report_is_json(self, run_cells: Run) -> None:
        report = json.loads(json.dumps(run_cells("1").report.as_dict()))
        assert report["cells"] == {"0": "ok"}
        assert report["tier"] == "namespaces"
        assert report["memory_peak_bytes"] > 10 * MIB
        assert 0 < report["wall_seconds"] < 90

    def test_the_kernels_environment(self, run_cells: Run, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "canary")
        execution = run_cells(
            "import os; print(dict(os.environ))",
            kernel=dataclasses.replace(kernel, environment={"MINE": "of the spec"}),
        )
        assert "'MINE': 'of the spec'" in text_of(execution)
        assert "canary" not in text_of(execution)

    def test_home_files(self, run_cells: Run, kernel: Kernel) -> None:
        files = {"/home/student/.config/note": "hello"}
        execution = run_cells("!cat ~/.config/note", kernel=dataclasses.replace(kernel, home_files=files))
        assert text_of(execution) == "hello"


class TestEnds:
    """The kernel ends in a cell: that cell says why, the rest says that it was not run."""

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("os._exit(3)", "exit code 3"),
            ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
            ("os.kill(os.getpid(), 9)", "SIGKILL"),
            ("os.kill(os.getpid(), 40)", "40"),
        ],
    )
    def test_by_itself(self, run_cells: Run, code: str, words: str) -> None:
        execution = run_cells("'before'", f"import os\nprint('in', flush=True)\n{code}", "'next'", "'more'")
        assert endings(execution) == ["ok", "kernel died", "not run", "not run"]
        assert execution.report.ended == "kernel died"
        assert words in execution.report.message
        assert execution.notebook.cells[0].outputs[0].data["text/plain"] == "'before'"
        assert text_of(execution, 1) in {"in\n", ""}  # what ZeroMQ had not sent yet is lost with the process
        assert errors_of(execution, 1) == ["KernelDiedError"]
        assert words in execution.notebook.cells[1].outputs[-1].evalue
        for index in (2, 3):
            assert errors_of(execution, index) == ["NotRunError"]
            assert "cell 2" in execution.notebook.cells[index].outputs[0].evalue

    def test_politely(self, run_cells: Run) -> None:
        execution = run_cells("print('in', flush=True); quit()", "'next'")
        assert text_of(execution, 0) == "in\n"
        assert execution.notebook.cells[1].outputs != []
        assert endings(execution)[1] in {"ok", "kernel died", "not run"}

    @pytest.mark.slow
    def test_wall_limit_and_the_next_notebook(self, run_cells: Run) -> None:
        with tempfile.TemporaryFile() as keep:
            code = "import time; time.sleep(60)"
            execution = run_cells("'before'", code, "'next'", limits=Limits(wall_seconds=10), keep=keep)
            assert endings(execution) == ["ok", "kernel died", "not run"]
            assert (execution.report.ended, execution.report.limits) == ("wall", ("wall",))
            assert "wall limit of 10 s" in execution.notebook.cells[1].outputs[-1].evalue
            assert "wall limit of 10 s" in execution.notebook.cells[2].outputs[-1].evalue
            following = run_cells("1", files=keep if keep.seek(0, os.SEEK_END) else None)
            assert endings(following) == ["ok"]

    @pytest.mark.slow
    def test_cpu_limit(self, run_cells: Run) -> None:
        execution = run_cells("while True: pass", "'next'", limits=Limits(cpu_seconds=3, wall_seconds=90))
        assert endings(execution) == ["kernel died", "not run"]
        assert (execution.report.ended, execution.report.limits) == ("cpu", ("cpu",))
        assert "cpu limit of 3 s" in execution.notebook.cells[0].outputs[-1].evalue

    @pytest.mark.slow
    def test_memory_limit_of_all_together(self, run_cells: Run) -> None:
        code = (
            "import subprocess, sys, time\n"
            "hoard = 'x = b\"1\" * (100 << 20); import time; time.sleep(60)'\n"
            "kids = [subprocess.Popen([sys.executable, '-c', hoard]) for _ in range(5)]\n"
            "time.sleep(60)"
        )
        execution = run_cells(
            code, "'next'", limits=Limits(memory_bytes=350 * MIB, wall_seconds=90), settings=Settings(timeout=80)
        )
        assert endings(execution) == ["kernel died", "not run"]
        assert execution.report.limits == ("memory",)
        assert "memory limit of 350 MiB" in execution.notebook.cells[0].outputs[-1].evalue

    def test_memory_limit_of_one_is_a_memory_error(self, run_cells: Run) -> None:
        execution = run_cells(
            "x = bytearray(700 << 20)", "'next'", limits=Limits(memory_bytes=400 * MIB, wall_seconds=90)
        )
        assert errors_of(execution) == ["MemoryError"]
        assert endings(execution) == ["ok", "ok"]

    @pytest.mark.parametrize(
        ("code", "limit", "words"),
        [
            ("x = bytearray(2 << 30)", "memory", "memory limit of 400 MiB"),
            ("open('x', 'wb').write(b'x' * (20 << 20))", "files", "file limit of 8 MiB in 50 files"),
            ("for n in range(100): open(f'f{n}', 'w').close()", "files", "in 50 files"),
            ("import os; fds = [os.dup(0) for _ in range(1000)]", "open_files", "limit of 200 open files"),
            ("import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=(5,)).start()",
             "processes", "limit of 60 processes and threads"),
            ("import os, time\nfor _ in range(99):\n    if os.fork() == 0: time.sleep(5); os._exit(0)",
             "processes", "limit of 60 processes and threads"),
        ],
    )  # fmt: skip
    def test_a_refusal_says_which_limit_it_was(self, run_cells: Run, code: str, limit: str, words: str) -> None:
        limits = Limits(
            memory_bytes=400 * MIB, files_bytes=8 * MIB, files_count=50, open_files=200, processes=60, wall_seconds=90
        )
        execution = run_cells(code, "'next'", limits=limits)
        assert limit in execution.report.limits
        (error,) = [output for output in execution.notebook.cells[0].outputs if output.output_type == "error"]
        assert words in error.traceback[-1]

    def test_full_disk_is_an_error_of_the_cell(self, run_cells: Run) -> None:
        execution = run_cells(
            "open('x', 'wb').write(b'x' * (20 << 20))", "'next'", limits=Limits(files_bytes=8 * MIB, wall_seconds=90)
        )
        assert errors_of(execution) == ["OSError"]
        assert endings(execution) == ["ok", "ok"]


class TestOutputs:
    LIMITS = Limits(cell_output_bytes=1 * MIB, output_bytes=3 * MIB, wall_seconds=90)

    def test_a_flood_is_cut_with_a_notice_and_the_notebook_goes_on(self, run_cells: Run) -> None:
        execution = run_cells("for _ in range(4_000): print('x' * 1000)", "'next'", limits=self.LIMITS)
        assert endings(execution) == ["ok", "ok"]
        assert execution.report.limits == ("output",)
        assert 100_000 < len(text_of(execution)) < 2 * MIB
        assert "cut: at most 1 MiB a cell and 3 MiB a notebook" in execution.notebook.cells[0].outputs[-1].text
        assert execution.notebook.cells[1].outputs[0].data["text/plain"] == "'next'"

    @pytest.mark.slow
    def test_an_endless_flood_ends_with_its_timeout(self, run_cells: Run) -> None:
        execution = run_cells(
            "while True: print('x' * 100)", "'next'", limits=self.LIMITS, settings=Settings(timeout=2)
        )
        assert endings(execution)[0] in {"timeout", "stuck", "iopub timeout", "lost"}
        assert errors_of(execution)
        assert len(json.dumps(execution.notebook)) < 8 * MIB
        assert {"timeout", "output"} & set(execution.report.limits)
        assert execution.notebook.cells[1].outputs

    @pytest.mark.slow
    def test_the_error_after_a_flood_is_kept(self, run_cells: Run) -> None:
        execution = run_cells("for _ in range(5000): print('x' * 1000)\nassert False, 'failed'", limits=self.LIMITS)
        assert "AssertionError" in errors_of(execution)

    @pytest.mark.slow
    def test_one_message_that_is_too_large(self, run_cells: Run) -> None:
        code = (
            "from IPython.display import display\ndisplay({'text/plain': 'x' * 30_000_000}, raw=True)\nprint('after')"
        )
        execution = run_cells("'before'", code, "'next'", limits=Limits(wall_seconds=90))
        assert execution.notebook.cells[0].outputs[0].data["text/plain"] == "'before'"
        assert execution.notebook.cells[2].outputs[0].data["text/plain"] == "'next'"
        assert execution.notebook.cells[1].outputs
        assert len(json.dumps(execution.notebook)) < 30_000_000

    def test_the_notebooks_budget(self, run_cells: Run) -> None:
        code = "print('x' * 900_000)"
        execution = run_cells(*[code] * 5, "1 / 0", limits=self.LIMITS)
        assert sum(len(text_of(execution, index)) for index in range(5)) < 3 * MIB + 10_000
        assert "cut" in text_of(execution, 4)
        assert errors_of(execution, 5) == ["ZeroDivisionError"]
        assert execution.report.limits == ("output",)


SEND = "k = get_ipython().kernel\nk.session.send(k.iopub_socket, {!r}, {}, parent=k.get_parent()) and None"
ODD_MESSAGES = {
    "text is a number": SEND.format("stream", {"name": "stdout", "text": 5}),
    "name is a list": SEND.format("stream", {"name": ["stdout"], "text": "x"}),
    "no content": SEND.format("stream", {}),
    "traceback is a text": SEND.format("error", {"ename": "A", "evalue": "b", "traceback": "t"}),
    "nothing in the error": SEND.format("error", {"ename": None, "evalue": 5, "traceback": [None]}),
    "data is a number": SEND.format("display_data", {"data": 5, "metadata": {}}),
    "metadata is a list": SEND.format("display_data", {"data": {}, "metadata": [1]}),
    "text/plain is a number": "display({'text/plain': 5}, raw=True)",
    "a mime type of no form": "display({'a b/c+json': {'x': 1}, 'text/plain': 'x'}, raw=True)",
    "image is a dict": "display({'image/png': {'x': 1}}, raw=True)",
    "count is huge": "get_ipython().execution_count = 2 ** 40",
    "display id is a list": SEND.format("display_data", {"data": {}, "metadata": {}, "transient": {"display_id": [1]}}),
    "update of nothing": SEND.format(
        "update_display_data", {"data": {}, "metadata": {}, "transient": {"display_id": "?"}}
    ),
    "state is a number": SEND.format(
        "comm_open", {"comm_id": "a", "data": {"state": 5}, "target_name": "jupyter.widget"}
    ),
    "comm id is a list": SEND.format("comm_msg", {"comm_id": ["a"], "data": {"state": {"_model_name": "x"}}}),
    "comm without data": SEND.format("comm_msg", {"comm_id": "a"}),
    "status is a list": SEND.format("status", {"execution_state": ["idle"]}),
    "unknown type": SEND.format("no_such_type", {"a": 1}),
    "lone surrogate": "print('\\ud800')",
    "lone surrogate shown": "display({'text/plain': '\\ud800'}, raw=True)",
    "not a number": "display({'application/json': {'x': float('nan')}}, raw=True)",
    "deep": "x = []\nfor _ in range(500): x = [x]\ndisplay({'application/json': {'x': x}}, raw=True)",
}


@pytest.fixture(scope="module")
def odd(kernel: Kernel, kernel_policy: Policy) -> Any:
    """Each odd cell followed by an honest one, all in one kernel; one by one only where that fails as a whole."""

    def run(names: list[str]) -> dict[str, Any]:
        sources = ["'before'", *(part for name in names for part in (ODD_MESSAGES[name], "'next'"))]
        notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
        cells = execute(notebook, kernel, kernel_policy).notebook.cells
        return {name: (cells[0], cells[2 * n + 1], cells[2 * n + 2]) for n, name in enumerate(names)}

    try:
        found = run(list(ODD_MESSAGES))
    except SandboxError:
        return lambda name: run([name])[name]
    return found.get


class TestOddMessages:
    """What student code sends is never a reason for a SandboxError: its cell fails, the others keep their outputs."""

    @pytest.mark.parametrize("name", ODD_MESSAGES)
    def test_one_cell_pays(self, odd: Any, name: str) -> None:
        before, cell, following = odd(name)
        assert before.outputs[0].data["text/plain"] == "'before'"
        assert following.outputs[0].data["text/plain"] == "'next'"
        nbformat.validate(new_notebook(cells=[cell]))
        json.dumps(cell, allow_nan=False, ensure_ascii=False).encode("utf-8")

    def test_a_negative_count_costs_its_own_cells(self, run_cells: Run) -> None:
        execution = run_cells("'before'", "get_ipython().execution_count = -2", "1", "2", "'next'")
        assert execution.notebook.cells[0].outputs[0].data["text/plain"] == "'before'"
        assert execution.notebook.cells[4].outputs[0].data["text/plain"] == "'next'"

    def test_a_language_of_no_form(self, run_cells: Run) -> None:
        code = "get_ipython().kernel.__class__.language_info = {'name': 5, 'codemirror_mode': [1], 'mimetype': None}"
        assert endings(run_cells(code, "'next'")) == ["ok", "ok"]


class TestFiles:
    def test_the_archive_is_the_work_directory(self, run_cells: Run, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "küsten namen.csv").write_text("a,b\n")
        (tmp_path / "helpers.py").write_text("answer = 42")
        (tmp_path / "ps1.ipynb").write_text("{}")
        with pack(tmp_path, leave_out=["*.ipynb"], max_bytes=1000, max_files=10) as files:
            execution = run_cells(
                "import os, helpers\n"
                "print(open('data/küsten namen.csv').read(), helpers.answer, os.getcwd(), os.listdir('.'))",
                files=files,
            )
        assert text_of(execution).startswith("a,b\n 42 /home/student/work ['")
        assert "ipynb" not in text_of(execution)

    def test_the_notebook_is_nowhere(self, run_cells: Run) -> None:
        # -xdev: an environment that lies below /tmp or HOME is a mount of its own, with notebooks of its packages.
        code = (
            "!cd /; find home tmp dev run -xdev -name '*.ipynb'; "
            "find home tmp dev/shm run/kernel -xdev -type f -exec grep -l can''ary-77 {} +"
        )
        execution = run_cells(code, "'canary-77'")
        assert text_of(execution) == ""

    def test_written_files_go_on_to_the_next_notebook(self, run_cells: Run, tmp_path: Path) -> None:
        (tmp_path / "given").write_text("given")
        with tempfile.TemporaryFile() as keep, pack(tmp_path, leave_out=(), max_bytes=10, max_files=9) as files:
            run_cells(
                "open('made', 'w').write('made'); open('given', 'a').write('+'); open('/tmp/t', 'w')",
                files=files,
                keep=keep,
            )
            execution = run_cells(
                "import os; print(open('made').read(), open('given').read(), os.path.exists('/tmp/t'))",
                files=keep,
            )
            keep.seek(0)
            with tarfile.open(fileobj=keep) as archive:
                assert {"made", "given"} <= set(archive.getnames())
                assert not any(name.endswith(".ipynb") for name in archive.getnames())
        assert text_of(execution) == "made given+ False\n"
        assert (tmp_path / "given").read_text() == "given"

    def test_files_of_a_kernel_that_died_are_kept_too(self, run_cells: Run) -> None:
        with tempfile.TemporaryFile() as keep:
            run_cells("open('made', 'w').write('x')", "import os; os.kill(os.getpid(), 9)", keep=keep)
            assert text_of(run_cells("print(open('made').read())", files=keep)) == "x\n"

    def test_files_of_the_student_do_not_replace_the_kernel(self, run_cells: Run, tmp_path: Path) -> None:
        for name in ("ipykernel_launcher.py", "ipykernel.py", "IPython.py", "zmq.py", "sitecustomize.py"):
            (tmp_path / name).write_text("import os; os._exit(42)")
        with pack(tmp_path, leave_out=(), max_bytes=1000, max_files=9) as files:
            assert endings(run_cells("1", files=files)) == ["ok"]


class TestStart:
    """A kernel that does not start is nobody's failed cell."""

    def test_a_module_that_is_not_there(self, run_cells: Run) -> None:
        with pytest.raises(SandboxError, match="no_such_kernel") as caught:
            run_cells("1", kernel=Kernel([sys.executable, "-m", "no_such_kernel", "-f", "{connection_file}"]))
        assert caught.value.layer == "kernel"
        assert "did not start" in str(caught.value)

    def test_a_program_that_is_not_there(self, run_cells: Run) -> None:
        with pytest.raises(SandboxError, match="/no/such/kernel") as caught:
            run_cells("1", kernel=Kernel(["/no/such/kernel", "{connection_file}"]))
        assert caught.value.layer == "kernel"

    def test_its_last_line_is_quoted(self, run_cells: Run) -> None:
        code = "import sys; print('x' * 10_000, file=sys.stderr); sys.exit('the last words')"
        with pytest.raises(SandboxError, match="exit code 1; it said: the last words"):
            run_cells("1", kernel=Kernel([sys.executable, "-c", code]))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "code",
        ["import time; time.sleep(60)", "import time\nwhile True: print('noise', flush=True); time.sleep(0.05)"],
        ids=["silent", "noisy"],
    )
    def test_startup_timeout(self, run_cells: Run, code: str) -> None:
        started = time.monotonic()
        with pytest.raises(SandboxError, match="not ready within 1 s") as caught:
            run_cells(
                "1",
                kernel=Kernel([sys.executable, "-c", code]),
                settings=Settings(startup_timeout=1),
                limits=Limits(wall_seconds=30),
            )
        assert caught.value.layer == "kernel"
        assert time.monotonic() - started < 25

    def test_a_driver_that_fails_is_the_graders_fault(self, run_cells: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def tiny(limits: Limits) -> Limits:
            return dataclasses.replace(limits, memory_bytes=MIB)

        monkeypatch.setattr(rooms, "driver_limits", tiny)
        with pytest.raises(SandboxError) as caught:
            run_cells("1")
        assert caught.value.layer == "driver"

    def test_a_document_that_lies_is_the_graders_fault(self, run_cells: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: bytes) -> Any:
            raise SandboxError("driver", "it sent a document that cannot be used")

        monkeypatch.setattr(notebook_module.outputs, "parse_document", refuse)
        with pytest.raises(SandboxError):
            run_cells("1")
