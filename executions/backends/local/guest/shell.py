"""The IPython shell of a context: what ipykernel's is, without its sockets and threads, and with E2B's formatters."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.formatters import BaseFormatter
from IPython.core.interactiveshell import InteractiveShell
from traitlets import ObjectName, Unicode
from traitlets.config import Config

TEXT_LIMIT = 1 << 20  # of one error's value or traceback, in characters
CELL_LIMIT = 1_000_000  # cells of a DataFrame that still travel as data

Send = Callable[..., None]


def _never(**event: Any) -> None:
    """Where events go while the zygote warms up."""


class Hook(DisplayHook):
    """Sends the value of a cell."""

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict, md_dict: dict | None = None) -> None:
        self.shell.send(type="result", main=True, mime=format_dict)


class Publisher(DisplayPublisher):
    """Sends what display() is given."""

    def publish(self, data: dict, metadata: dict | None = None, **_: Any) -> None:
        self.shell.send(type="result", main=False, mime=data)

    def clear_output(self, wait: bool = False) -> None:
        pass


class Shell(InteractiveShell):
    send: Send = staticmethod(_never)

    def enable_gui(self, gui: Any = None) -> None:
        pass

    def ask_exit(self) -> None:
        raise SystemExit(0)

    def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
        try:
            value = str(evalue)
        except Exception:
            value = f"<unprintable {etype.__name__}>"
        traceback = "\n".join(stb)
        self.send(type="error", name=etype.__name__, value=value[:TEXT_LIMIT], traceback=traceback[-TEXT_LIMIT:])


class FrameFormatter(BaseFormatter):
    """A DataFrame as {column: list}, for charts and tables on the other side."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict


class ChartFormatter(BaseFormatter):
    """A matplotlib figure as the numbers it was drawn from."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, obj: Any) -> Any:
        figures = sys.modules.get("matplotlib.figure")  # not registered by type: %matplotlib removes what is
        return _chart(obj) if figures and isinstance(obj, figures.Figure) else super().__call__(obj)


def _frame(frame: Any) -> dict | None:
    if frame.size > CELL_LIMIT or not frame.columns.is_unique:
        return None
    split = json.loads(frame.to_json(orient="split", date_format="iso", index=False, default_handler=str))
    return {str(name): [row[at] for row in split["data"]] for at, name in enumerate(frame.columns)}


def _chart(figure: Any) -> dict | None:
    from e2b_charts import chart_figure_to_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydantic's, about NumPy's numbers
            found = chart_figure_to_dict(figure)
        return json.loads(json.dumps(found, allow_nan=False, default=lambda number: number.item()))
    except Exception:  # a figure that it cannot read is still a picture
        return None


def _json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return value


def make() -> Shell:
    config = Config()
    config.HistoryManager.enabled = False  # its thread would exist at every fork
    config.PlainTextFormatter.max_seq_length = 0
    shell = Shell.instance(
        config=config,
        colors="nocolor",
        displayhook_class=Hook,
        display_pub_class=Publisher,
        banner1="",
        autoindent=False,
    )
    formatters = shell.display_formatter.formatters
    shell.display_formatter.active_types = list(formatters)
    for formatter in (FrameFormatter(parent=shell.display_formatter), ChartFormatter(parent=shell.display_formatter)):
        formatters[formatter.format_type] = formatter
        shell.display_formatter.active_types.append(formatter.format_type)
    formatters["e2b/data"].for_type_by_name("pandas", "DataFrame", _frame)
    for kind in (dict, list):
        formatters["application/json"].for_type(kind, _json)
    return shell
