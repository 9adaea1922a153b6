"""What became of a job."""

from dataclasses import dataclass

DONE, ALREADY_DONE, FAILED, BUSY = "done", "already done", "failed", "busy"


@dataclass(frozen=True)
class Outcome:
    """What became of a job. status: DONE, ALREADY_DONE, FAILED, BUSY, or what the stage says; text: why it failed."""

    name: str
    status: str
    text: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """A row of the closing table."""
        seconds = f"  {self.seconds:.1f} s" if self.status == DONE else ""
        return f"{self.name}: {self.status}{seconds}{': ' + self.text if self.text else ''}"
