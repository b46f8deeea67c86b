"""Secrets of the service, and lies on the wires that lead out of the sandbox."""

from __future__ import annotations

from executions.attacks.arena import Arena, Attack, Ran, Through
from executions.backends.base import Handle
from executions.errors import BackendError


async def _no_secret_is_said(arena: Arena, handle: Handle, ran: Ran) -> str:
    said = ran.stdout + "".join(text for error in ran.errors for text in error.values())
    for secret in arena.secrets:
        if secret in said:
            raise Through("a secret of the service is in what the sandbox sees")
    return f"none of {len(arena.secrets)} secrets in {len(said):,} characters"


async def _next_run_is_its_own(arena: Arena, handle: Handle, ran: Ran) -> str:
    """After a restart of the context, the next run hears only itself."""
    for context in await arena.backend.list_contexts(handle):
        await arena.backend.restart_context(handle, context["id"])
    seen = [event async for event in arena.backend.run_code(handle, "print('mine')\n6 * 7", timeout_seconds=10)]
    said = "".join(event.data["text"] for event in seen if event.kind == "stdout")
    values = [event.data["mime"].get("text/plain") for event in seen if event.kind == "result"]
    if said != "mine\n" or values != ["42"] or any(event.kind == "error" for event in seen):
        raise Through(f"the next run says {said[:100]!r} and {values[:3]!r}")
    return f"the forger's own run ended as {ran.end}; the next one is its own"


async def _files_do_not_answer_with_secrets(arena: Arena, handle: Handle, ran: Ran) -> str:
    """The agent reads files with its own eyes: it must see no more than a guest."""
    for path in (
        "/proc/self/environ",
        "/proc/1/environ",
        "/proc/self/cmdline",
        "/proc/self/maps",
        "/proc/self/mountinfo",
    ):
        try:
            read = b"".join([piece async for piece in arena.backend.read_file(handle, path)])
        except BackendError:
            continue
        for secret in arena.secrets:
            if secret.encode() in read:
                raise Through(f"a secret of the service is in {path}")
    return "nothing of the service"


_FRAMES = r"""
FRAMES = [b'\xff\xfe{"type": "end"}', b'[1]', b'{"type": 5}', b'null', b'{}', b'"end"', b'{"type": ["end"]}', b'{"type": {"a": 1}}',
          b'{"type": "result", "mime": 7}', b'{"type": "result"}', b'{"type": "result", "mime": {"text/plain": {"a": NaN}, "type": "end", "": 1}}',
          b'{"type": "stdout", "text": 7}', b'{"type": "stdout", "text": "\\ud800\\u0000"}', b'{"type": "count", "execution_count": -1}',
          b'{"type": "count", "execution_count": ' + b'9' * 4000 + b'}', b'{"type": "count", "execution_count": 1e999}',
          b'{"type": "error", "name": null, "value": [], "traceback": {}}', b'{"type": "keepalive"}', b'{"type": "usage", "cpu_us": 0}',
          b'{"type": "exit", "exit_code": 0}', b'{"type": "died"}', b'{"type": "end_of_execution"}', b'{"type": "end", "_size": "x"}',
          b'{"type": "result", "mime": {"application/json": ' + b'[' * 900 + b']' * 900 + b'}}',
          b'{"type": "result", "mime": {"application/json": ' + b'{"a":' * 400 + b'1' + b'}' * 400 + b'}}',
          b'[' * 100_000, b'x' * 100_000, b'HTTP/1.1 200 OK\r\n\r\n', b'\0' * 1000]
def wires():
    for descriptor in map(int, os.listdir('/proc/self/fd')):
        try:
            if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.set_blocking(descriptor, True)
                yield descriptor
        except OSError:
            pass
"""

ATTACKS = (
    Attack(
        "secrets_in_the_environment", ("agent",), judge=_no_secret_is_said,
        code=r"""
import glob, traceback
print(dict(os.environ))
for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
    try:
        print(open(path).read())
    except OSError:
        pass
print({name: repr(value)[:500] for name, value in globals().items()})
try:
    raise RuntimeError
except RuntimeError:
    frame = sys._getframe()
    while frame:
        print({name: repr(value)[:2000] for name, value in frame.f_locals.items()})
        frame = frame.f_back
print([repr(vars(module))[:500] for name, module in sorted(sys.modules.items()) if 'sandgate' in str(getattr(module, '__file__', '')) ])
import gc
print([text for text in gc.get_objects() if isinstance(text, dict) and any('KEY' in str(key) for key in list(text)[:50])][:50])
""",
    ),
    Attack(
        "secrets_in_a_traceback", ("agent",), judge=_no_secret_is_said, ends=("ZeroDivisionError",),
        code="from IPython import get_ipython\nget_ipython().run_line_magic('xmode', 'Verbose')\n1 / 0",
    ),
    Attack("secrets_by_the_file_service", ("agent",), judge=_files_do_not_answer_with_secrets),
    Attack(
        "forged_frames", ("agent",), judge=_next_run_is_its_own, fresh=True, own_kernel=False, seconds=3,
        ends=("value", "cut", "timeout", "ContextRestarting", "None", ""),
        code=_FRAMES + r"""
for wire in wires():
    for frame in FRAMES:
        os.write(wire, frame + b'\n')
""",
    ),
    Attack(
        "forged_frames_on_output", ("agent",), judge=_next_run_is_its_own, fresh=True,
        code=_FRAMES + r"""
for frame in FRAMES + [b'{"type": "end"}', b'{"type": "error", "name": "x", "value": "", "traceback": ""}']:
    os.write(1, frame + b'\n')
    os.write(2, frame + b'\n')
""",
    ),
    Attack(
        "forged_end", ("agent",), judge=_next_run_is_its_own, fresh=True, own_kernel=False, seconds=10,
        ends=("value", "cut", "timeout", "ContextRestarting"),
        code=_FRAMES + r"""
for wire in wires():
    os.write(wire, b'{"type": "end"}\n')
threading.Thread(target=lambda: [print('late') or time.sleep(0.01) for _ in range(200)], daemon=True).start()
time.sleep(1)
""",
    ),
    Attack(
        "endless_frame", ("agent",), judge=_next_run_is_its_own, fresh=True, own_kernel=False, seconds=20,
        ends=("timeout", "ContextRestarting", "BrokenPipeError", "ConnectionResetError"),
        code=_FRAMES + r"""
piece = b'x' * (1 << 20)
for wire in wires():
    os.write(wire, b'{"type": "result", "mime": {"text/plain": "')
    while True:
        os.write(wire, piece)
""",
    ),
    Attack(
        "frame_that_swells", ("agent", "cgroups"), judge=_next_run_is_its_own, fresh=True, own_kernel=False, seconds=30,
        ends=("value", "timeout", "ContextRestarting", "MemoryError", "OutOfMemory"),
        code=_FRAMES + r"""
for wire in list(wires())[:1]:
    frame = b'{"type": "result", "mime": {"application/json": [' + b'[],' * (14 << 20) + b'0]}}\n'
    sent = memoryview(frame)
    while sent:
        sent = sent[os.write(wire, sent[:1 << 20]):]
""",
    ),
    Attack(
        "flood_of_frames", ("agent",), judge=_next_run_is_its_own, fresh=True, own_kernel=False, seconds=20,
        ends=("value", "timeout", "ContextRestarting"),
        code=_FRAMES + r"""
piece = b'{"type":"?"}\n' * 10_000
for wire in list(wires())[:1]:
    for _ in range(30):
        sent = memoryview(piece)
        while sent:
            sent = sent[os.write(wire, sent):]
""",
    ),
    Attack(
        "closed_wires", ("agent",), judge=_next_run_is_its_own, fresh=True, seconds=5,
        ends=("value", "cut", "timeout", "ContextRestarting", "OSError", "ValueError"),
        code="os.closerange(0, 1024)\ntime.sleep(1)",
    ),
    Attack(
        "exit_in_mid_run", ("agent",), judge=_next_run_is_its_own, fresh=True, ends=("ContextRestarting",),
        code="print('half')\nos._exit(0)",
    ),
)  # fmt: skip
