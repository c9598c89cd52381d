"""What programs of several commands share: what each command does, how it ends, and how its errors are told."""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import ConfigError, UnimissError

INTERRUPTED = 130
EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "another error",
    2: "a file or the command line is wrong",
    3: "no scan can be used",
    4: "no good checkpoint",
    5: "a round could not be completed",
    6: "the ledger is damaged",
    8: "the audit log is damaged or full",
    INTERRUPTED: "interrupted",
}
"""docs/artefacts.md has those of every program; `unimiss_core.errors` says which error has which."""
OF_EVERY_COMMAND = frozenset({0, 1, 2, INTERRUPTED})


@dataclass(frozen=True)
class Command:
    """does: in words, for whoever asks for help. takes: adds what its command line takes, and sets `act`, which is
    called with what was given. codes: exit codes besides those of every command."""

    does: str
    takes: Callable[[argparse.ArgumentParser], None]
    codes: Collection[int] = ()


@dataclass(frozen=True)
class Program:
    """name: as it is typed. commands: by name, as help lists them."""

    name: str
    description: str
    commands: Mapping[str, Command]

    def run(self, arguments: Sequence[str] | None) -> int:
        """Run the command that was typed; returns its exit code."""
        options = self._parser().parse_args(arguments)
        return exit_code_of(lambda: options.act(options), self.name, interrupted=f"{self.name}: interrupted")

    def _parser(self) -> argparse.ArgumentParser:
        every = {code for command in self.commands.values() for code in command.codes}
        parser = argparse.ArgumentParser(prog=self.name, description=self.description, epilog=_exit_codes(every))
        added = parser.add_subparsers(required=True, metavar="COMMAND")
        for name, command in self.commands.items():
            epilog = _exit_codes(command.codes)
            command.takes(added.add_parser(name, help=command.does, description=command.does, epilog=epilog))
        return parser


def exit_code_of(
    act: Callable[[], None], name: str, *, interrupted: str, out_of_memory: str = "free it of other work"
) -> int:
    """Do it, and tell on the screen how it ended where it did not end well. name: whose mistakes are told. interrupted:
    what is said upon Ctrl-C. out_of_memory: what may be done where memory, of the machine or of a GPU, does not
    suffice."""
    try:
        act()
    except UnimissError as error:
        way_on = "\nThe same command goes on from there." if error.resumes else ""
        print(f"{name}: {error}{way_on}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(
            f"{name}: what it needs is not this user's ({error.strerror}); type the command as the user whom the "
            "program runs as, which owns its folders",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    except OSError as error:  # never its text, which may name a file below a data root
        print(
            f"{name}: the system refuses what was asked of it ({error.strerror or 'unknown error'}); mend its disk, or "
            "the folder or file that is not as it should be, and type the command again",
            file=sys.stderr,
        )
        return UnimissError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name}: the memory of {_whose_memory(error)} ran out; {out_of_memory}", file=sys.stderr)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    return 0


def _whose_memory(error: BaseException) -> str:
    """As the error's words tell, which are not shown: they are long, and name nothing that a user can change."""
    return "the GPU" if any(name in str(error) for name in ("CUDA", "CUBLAS", "CUDNN")) else "this machine"


def _exit_codes(more: Collection[int]) -> str:
    told = [f"{code} {meaning}" for code, meaning in EXIT_CODES.items() if code in OF_EVERY_COMMAND | set(more)]
    return f"Exit codes: {', '.join(told)}."
