"""Write down bad records, and stop a run that has too many of them."""

import json
from pathlib import Path

from cafe.data.batch import Batch
from cafe.errors import CafeError
from cafe.utils.text import escape_controls

MIN_ALL_BAD = 8  # records; a run whose first ones are all bad stops at so many
MIN_RECORDS_FOR_FRACTION = 100  # before the fraction of bad ones means much


class Quarantine:
    """Write down bad records, and stop a run that has too many of them.

    Args:
        file: gets one JSON line per bad record.
        max_bad_fraction: the fraction of bad records (0 to 1) above which the run stops.
        num_bad, num_records, num_truncated: counts of the steps that are already done, of which the last is of records
            that were cut to the longest sequence. Lines of later steps are dropped from the file.
    """

    def __init__(
        self, file: Path, max_bad_fraction: float, num_bad: int = 0, num_records: int = 0, num_truncated: int = 0
    ) -> None:
        self.file, self.max_bad_fraction = file, max_bad_fraction
        self.num_bad, self.num_records, self.num_truncated = num_bad, num_records, num_truncated
        if file.is_file():
            # A resumed run meets the records after its last saved step again.
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(lines[:num_bad]))

    def record(self, batch: Batch) -> Batch:
        """Count a batch's records and write down the bad ones; return the batch.

        Raises:
            CafeError: too many are bad: all of the first 8 or more, or more than the allowed fraction of at least 100.
        """
        self.num_bad += len(batch.bad_records)
        self.num_records += len(batch.bad_records) + len(batch.record_names)
        self.num_truncated += batch.num_truncated
        # Opened for each batch, so that a killed run loses no line.
        if batch.bad_records:
            with self.file.open("a") as out:
                out.writelines(json.dumps({"reason": reason}) + "\n" for reason in batch.bad_records)
        last_reason = batch.bad_records[-1] if batch.bad_records else "none"
        self._check_counts(escape_controls(last_reason))
        return batch

    def _check_counts(self, last_reason: str) -> None:
        """Make sure that there are not too many bad records so far.

        Raises:
            CafeError: there are.
        """
        details = f"{self.file} lists them. The last: {last_reason}"
        # Most often a wrong folder of images or a wrong column: no need to wait until a fraction means much.
        if self.num_bad == self.num_records >= MIN_ALL_BAD:
            raise CafeError(f"All of the first {self.num_bad} records are bad; {details}")
        if self.num_records < MIN_RECORDS_FOR_FRACTION:
            return
        if self.num_bad > self.max_bad_fraction * self.num_records:
            raise CafeError(
                f"{self.num_bad} of {self.num_records} records are bad, more than the {self.max_bad_fraction:.2%} that "
                f"data.max_bad_fraction allows; {details}"
            )
