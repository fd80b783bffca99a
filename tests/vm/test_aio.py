"""`vmette.AsyncSandbox`."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from subprocess import PIPE, STDOUT

import pytest

import vmette
from tests.vm.support import BASE, children
from vmette.providers import Cancelled

Test = Callable[[], Awaitable[None]]


def in_loop(test: Test) -> Callable[[], None]:
    """Runs `test` in an event loop of its own, in debug mode; what it leaves unclosed fails it."""

    @wraps(test)
    def run() -> None:
        before = children()
        complaints: list[dict[str, object]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            await test()

        asyncio.run(main(), debug=True)
        gc.collect()
        assert complaints == []
        assert children() == before

    return run


@asynccontextmanager
async def sandbox() -> AsyncIterator[vmette.AsyncSandbox]:
    async with vmette.AsyncSandbox(BASE) as sandbox:
        yield sandbox


async def sleeping(sandbox: vmette.AsyncSandbox, seconds: int) -> bool:
    """Whether a `sleep` for just so long runs in the guest."""
    script = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f; echo; done 2>/dev/null"
    listed = await sandbox.run(["sh", "-c", script], text=True)
    return f"sleep {seconds} " in listed.stdout.splitlines()


async def until_sleeping(sandbox: vmette.AsyncSandbox, seconds: int) -> None:
    while not await sleeping(sandbox, seconds):
        await asyncio.sleep(0.05)


@in_loop
async def test_run_is_the_sandbox_s_run() -> None:
    async with sandbox() as sb:
        done = await sb.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"\xff\0in")
        assert done == vmette.CompletedProcess(("sh", "-c", "cat; echo err >&2; exit 3"), 3, b"\xff\0in", b"err\n")
        assert (await sb.run(["cat"], input="grüß", text=True)).stdout == "grüß"
        assert (await sb.run(["pwd"], cwd="/usr", env={"A": "b"})).stdout == b"/usr\n"
        with pytest.raises(vmette.CalledProcessError):
            await sb.run(["false"], check=True)
        with pytest.raises(vmette.OutputTooLarge):
            await sb.run(["yes"], max_output=1000)
        with pytest.raises(vmette.CommandNotStarted):
            await sb.run(["nothing"])
        assert repr(sb) == "<vmette.AsyncSandbox builtin://base running>"
        assert sb.kernel == (await sb.run(["uname", "-r"], text=True)).stdout.strip()
    assert sb.closed
    assert repr(sb) == "<vmette.AsyncSandbox builtin://base ended (the sandbox has been closed)>"
    with pytest.raises(vmette.SandboxClosed):
        await sb.run(["true"])


@in_loop
async def test_a_time_out_carries_the_output_so_far_and_the_sandbox_goes_on() -> None:
    async with sandbox() as sb:
        with pytest.raises(vmette.TimeoutExpired) as caught:
            await sb.run(["sh", "-c", "echo out; sleep 1234"], timeout=5, text=True)
        assert (caught.value.timeout, caught.value.stdout) == (5, "out\n")
        assert not await sleeping(sb, 1234)


@in_loop
async def test_the_loop_turns_while_a_sandbox_boots_and_many_commands_run() -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    turning = asyncio.create_task(turn())
    async with sandbox() as sb:
        assert turns > 100
        done = await asyncio.gather(*(sb.run(["sh", "-c", f"sleep 1; echo {n}"]) for n in range(40)))
    turning.cancel()
    assert [one.stdout for one in done] == [b"%d\n" % n for n in range(40)]


@in_loop
async def test_a_cancelled_command_is_gone_with_all_its_processes() -> None:
    async with sandbox() as sb:
        running = asyncio.create_task(sb.run(["sh", "-c", "sleep 1111 & sleep 2222"]))
        await until_sleeping(sb, 1111)
        await until_sleeping(sb, 2222)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not await sleeping(sb, 1111)
        assert not await sleeping(sb, 2222)


@in_loop
async def test_a_command_that_is_cancelled_again_and_again_is_waited_for() -> None:
    async with sandbox() as sb:
        running = asyncio.create_task(sb.run(["sleep", "1111"]))
        await until_sleeping(sb, 1111)
        while not running.done():
            running.cancel()
            await asyncio.sleep(0)
        assert running.cancelled()
        assert not await sleeping(sb, 1111)


@in_loop
async def test_asyncio_s_own_time_out() -> None:
    async with sandbox() as sb:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sb.run(["sleep", "1111"]), 1)
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await sb.run(["sleep", "1111"])
        assert not await sleeping(sb, 1111)


@pytest.mark.parametrize("delay", [0, 0.01, 0.1, 0.2, 0.3])
def test_a_boot_that_is_cancelled_leaves_nothing(delay: float) -> None:
    """Whatever it is at."""

    async def test() -> None:
        before = children()
        sb = vmette.AsyncSandbox(BASE)
        booting = asyncio.create_task(sb.start())
        await asyncio.sleep(delay)
        if booting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await booting
        else:  # it was faster
            await sb.close()
        assert children() == before

    in_loop(test)()


@in_loop
async def test_a_boot_that_hangs_is_cancelled_at_once() -> None:
    """One whose kernel has nothing to do: it would be waited for for two minutes."""
    before = children()
    booting = asyncio.create_task(vmette.AsyncSandbox(BASE, cmdline="rdinit=/nothing panic=0").start())
    while children() == before:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    while not booting.done():
        booting.cancel()
        await asyncio.sleep(0)
    assert booting.cancelled()
    assert children() == before


def test_a_boot_asks_its_caller_whether_to_go_on() -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with pytest.raises(Cancelled):
        vmette.Sandbox(BASE, cancelled=cancelled, cmdline="rdinit=/nothing panic=0")
    assert asked == 3


@in_loop
async def test_a_sandbox_that_does_not_come_up() -> None:
    broken = vmette.AsyncSandbox("/nothing")
    with pytest.raises(vmette.VmetteError, match="/nothing"):
        await broken.start()
    assert broken.closed
    assert repr(broken) == "<vmette.AsyncSandbox /nothing not started>"
    with pytest.raises(vmette.SandboxClosed, match="has not been started"):
        await broken.run(["true"])
    await broken.close()


def test_a_loop_that_ends_ends_the_sandbox() -> None:
    """`asyncio.run` cancels what is left when its main task is over."""
    started = []

    async def background() -> None:
        async with sandbox() as sb:
            process = await sb.popen(["cat"], stdin=PIPE)
            started.append(process)
            await process.wait()

    async def main() -> None:
        asyncio.get_running_loop().background = asyncio.create_task(background())  # type: ignore[attr-defined]
        while not started:
            await asyncio.sleep(0.01)

    before = children()
    asyncio.run(main(), debug=True)
    gc.collect()
    assert children() == before


def test_a_sandbox_that_nobody_closes_ends_with_the_program() -> None:
    code = f"""
import asyncio, vmette
async def main():
    sandbox = vmette.AsyncSandbox({BASE!r})
    await sandbox.start()
    process = await sandbox.popen(["cat"])
    print((await sandbox.run(["echo", "up"], text=True)).stdout)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=True)
    assert done.stdout == b"up\n\n"


@in_loop
async def test_a_sandbox_that_is_forgotten_ends() -> None:
    before = children()
    sb = vmette.AsyncSandbox(BASE)
    await sb.start()
    await sb.start()
    assert len(children() - before) == 1
    assert (await sb.run(["true"])).returncode == 0
    del sb
    gc.collect()
    assert children() == before


@in_loop
async def test_streams() -> None:
    async with sandbox() as sb:
        process = await sb.popen(["sh", "-c", "read a; echo got $a; echo err >&2; read b; exit 4"], stdin=PIPE)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"hello\n")
        await process.stdin.drain()
        assert await process.stdout.readline() == b"got hello\n"
        assert await process.stderr.readexactly(4) == b"err\n"
        assert process.poll() is None
        process.stdin.close()
        await process.stdin.wait_closed()
        assert await process.wait() == 4
        assert process.returncode == 4
        assert await process.stdout.read() == b""
        assert repr(process).endswith("returncode=4>")


@in_loop
async def test_lines_as_they_come() -> None:
    async with sandbox() as sb:
        process = await sb.popen(["sh", "-c", "while read a; do echo $a; done; printf last"], stdin=PIPE)
        assert process.stdin is not None
        process.stdin.write(b"0\n")
        seen = []
        async for line in process.lines():
            seen.append(line)
            if line == "3":
                process.stdin.close()
            elif line != "last":
                process.stdin.write(b"%d\n" % (int(line) + 1))
        assert seen == ["0", "1", "2", "3", "last"]
        assert await process.wait() == 0


@in_loop
async def test_a_line_without_an_end_is_refused() -> None:
    async with sandbox() as sb:
        with pytest.raises(vmette.OutputTooLarge, match="a line is longer"):
            async with await sb.popen(["cat", "/dev/zero"]) as process:
                async for _ in process.lines():
                    pass
        assert process.poll() == -9


@in_loop
async def test_chunks_of_both_outputs() -> None:
    script = "for i in 1 2 3 4 5; do head -c 300000 /dev/zero; head -c 200000 /dev/zero >&2; done"
    async with sandbox() as sb:
        process = await sb.popen(["sh", "-c", script])
        taken = {1: 0, 2: 0}
        chunks = process.chunks()
        async for number, data in chunks:  # one who goes away, and comes back
            taken[number] += len(data)
            break
        await chunks.aclose()  # type: ignore[attr-defined]
        async for number, data in process.chunks():
            taken[number] += len(data)
        assert taken == {1: 1_500_000, 2: 1_000_000}
        assert await process.wait() == 0


@in_loop
async def test_communicate() -> None:
    async with sandbox() as sb:
        process = await sb.popen(["cat"], stdin=PIPE)
        data = bytes(range(256)) * 8000
        assert await process.communicate(data) == (data, b"")
        process = await sb.popen(["sh", "-c", "exec <&-; echo deaf"], stdin=PIPE, stderr=STDOUT)
        assert await process.communicate(data) == (b"deaf\n", b"")
        process = await sb.popen(["nothing"])
        with pytest.raises(vmette.CommandNotStarted):
            await process.communicate()


@in_loop
async def test_signals() -> None:
    async with sandbox() as sb:
        process = await sb.popen(["sh", "-c", "trap 'exit 7' USR1; echo up; while :; do sleep 0.1; done"])
        assert [await anext_line(process)] == ["up"]
        process.send_signal("USR1")
        assert await process.wait() == 7
        process = await sb.popen(["sleep", "1111"])
        process.terminate()
        assert await process.wait() == -15
        process = await sb.popen(["sleep", "1111"])
        process.kill()
        assert await process.wait() == -9


async def anext_line(process: vmette.AsyncPopen) -> str:
    async for line in process.lines():
        return line
    raise AssertionError("it says nothing")


@in_loop
async def test_a_block_that_fails_kills_its_command() -> None:
    async with sandbox() as sb:
        with pytest.raises(ZeroDivisionError):
            async with await sb.popen(["sh", "-c", "sleep 1111 & sleep 2222"], stdin=PIPE) as process:
                await until_sleeping(sb, 1111)
                _ = 1 / 0
        assert process.poll() == -9
        assert not await sleeping(sb, 1111)
        async with await sb.popen(["cat"], stdin=PIPE) as process:
            pass
        assert process.returncode == 0


@in_loop
async def test_what_nobody_reads_is_closed_with_the_sandbox() -> None:
    async with sandbox() as sb:
        for _ in range(3):
            await sb.popen(["yes"], stdin=PIPE)
        ended = await sb.popen(["echo", "unread"])
        await ended.wait()


def test_files_have_the_methods_of_the_sandbox_s() -> None:
    from vmette.aio_files import AsyncFiles
    from vmette.filesystem import Files

    names = {name for name, value in vars(Files).items() if callable(value) and name[0] != "_"}
    assert names == {name for name in vars(AsyncFiles) if name[0] != "_"}


@in_loop
async def test_files() -> None:
    async with sandbox() as sb:
        await sb.files.write("/tmp/a", b"data")
        assert await sb.files.read("/tmp/a") == b"data"
        assert await sb.files.exists("/tmp/a")
        await sb.files.remove("/tmp/a")
        assert not await sb.files.exists("/tmp/a")
        with pytest.raises(FileNotFoundError):
            await sb.files.read("/tmp/a")


@in_loop
async def test_a_cancelled_read_ends() -> None:
    """Of a FIFO that nobody writes to: the sandbox has to kill what waits in the guest."""
    async with sandbox() as sb:
        await sb.run(["mkfifo", "/tmp/fifo"], check=True)
        before = threading.active_count()
        reading = asyncio.create_task(sb.files.read("/tmp/fifo"))
        await asyncio.sleep(0.3)
        assert not reading.done()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        while threading.active_count() > before:
            await asyncio.sleep(0.02)


@in_loop
async def test_setting_the_clock_is_cancelled() -> None:
    failures: list[object] = []
    async with sandbox() as sb:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", failures.append)
            setting = asyncio.create_task(sb.sync_clock())
            before = threading.active_count()
            await asyncio.sleep(0)  # it has its thread now
            setting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await setting
            while threading.active_count() > before:
                await asyncio.sleep(0.02)
        await sb.sync_clock()
    assert failures == []


@in_loop
async def test_starting_a_command_is_cancelled() -> None:
    async with sandbox() as sb:
        for _ in range(5):
            starting = asyncio.create_task(sb.popen(["sleep", "1111"], stdin=PIPE))
            await asyncio.sleep(0)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
        assert not await sleeping(sb, 1111)
