"""The app with a fake engine, as a command: what the end-to-end test runs without a model.

`python tests/tui/launcher.py` answers "hold on" with an answer that never ends, anything else
with an echo.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Started as a script: the tests' folder and the project's are not on the path yet.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fakes import FakeEngine, FakeStream  # noqa: E402

from mimo_local.events import Progress  # noqa: E402
from tui.app import MimoApp  # noqa: E402


class Echo(FakeEngine):
    def submit(self, *args: Any, **kwargs: Any) -> FakeStream:
        prompt = self.tokenizer.decode(args[1]).rpartition("<user>")[2].partition("\n<ass")[0]
        if prompt == "hold on":
            self.queue("holding ", "on", hold=True)
        else:
            self.queue("You said: ", f"`{prompt}`", "\n\n1. *one*\n2. **two**")
        return super().submit(*args, **kwargs)


def load(on_event: Callable[[Progress], None]) -> Any:
    for step in range(5):
        on_event(Progress("opening the pack", step, 4, "files"))
        time.sleep(0.05)
    return Echo(delay_s=0.02)


if __name__ == "__main__":
    app = MimoApp(load)
    app.run()
    app.close()
    sys.exit(app.return_code)
