"""Cells that do the same in each language, for the contract of backends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cells:
    keeps: str  # 41 in `kept`, and a function `add` that adds to it
    asks: str  # add(1)
    answer: str
    says: str  # out on stdout, err on stderr
    fails: str
    error: tuple[str, str]
    loops: str
    env: str  # the variable ONCE


CELLS = {
    "javascript": Cells(
        keeps="let kept = 41\nfunction add(n) { return kept + n }",
        asks="add(1)",
        answer="42",
        says="console.log('out'); console.error('err')",
        fails="throw new TypeError('no')",
        error=("TypeError", "no"),
        loops="while (true) {}",
        env="process.env.ONCE",
    ),
    "typescript": Cells(
        keeps="enum Kept { It = 41 }\nconst add = (n: number): number => Kept.It + n",
        asks="add(1 as number)",
        answer="42",
        says="const out: string = 'out'\nconsole.log(out); console.error('err')",
        fails="throw new TypeError('no' as string)",
        error=("TypeError", "no"),
        loops="while (true as boolean) {}",
        env="process.env.ONCE as string",
    ),
    "java": Cells(
        keeps="int kept = 41;\nint add(int n) { return kept + n; }",
        asks="add(1)",
        answer="42",
        says='System.out.println("out"); System.err.println("err");',
        fails='throw new IllegalStateException("no");',
        error=("java.lang.IllegalStateException", "no"),
        loops="while (true) {}",
        env='System.getProperty("ONCE")',
    ),
    "r": Cells(
        keeps="kept <- 41\nadd <- function(n) kept + n",
        asks="add(1)",
        answer="[1] 42",
        says='cat("out\\n"); message("err")',
        fails='stop("no")',
        error=("simpleError", "no"),
        loops="repeat {}",
        env='Sys.getenv("ONCE")',
    ),
}
