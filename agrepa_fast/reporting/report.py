"""agrepa report: one html file with all that a run or an evaluation found."""

from pathlib import Path

from ..errors import UserError
from .evaluation_report import evaluation_report
from .page.document import write_document
from .run_report import run_report

REPORT = "report.html"
_KINDS = {"summary.json": run_report, "results.json": evaluation_report}  # the file that only a finished one has


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html and return its path. Raises UserError if the folder holds nothing finished."""
    for file, report in _KINDS.items():
        if (folder / file).is_file():
            try:
                document = report(folder)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise UserError(
                    f"{folder}: its files do not belong together ({type(error).__name__}: {error}); write them again"
                ) from error
            write_document(document, folder / REPORT)
            return folder / REPORT
    raise UserError(f"{folder} has no {' and no '.join(_KINDS)}: name the folder of a run or evaluation that has ended")
