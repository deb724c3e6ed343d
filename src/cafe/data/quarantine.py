"""Write down bad records, and stop a run that has too many."""

import json
from pathlib import Path

from cafe.data.batch import Batch
from cafe.errors import CafeError


class Quarantine:
    """Writes down bad records and stops a run that has too many.

    Args:
        file: one JSON line a bad record is appended here.
        max_bad_fraction: the largest share of bad records (0 to 1) before the run stops.
        num_bad, num_records: the records of the steps that are already done; what the file names of later ones is dropped.
    """

    def __init__(self, file: Path, max_bad_fraction: float, num_bad: int = 0, num_records: int = 0) -> None:
        self.file, self.max_bad_fraction = file, max_bad_fraction
        self.num_bad, self.num_records = num_bad, num_records
        if file.is_file():
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(lines[:num_bad]))

    def record(self, batch: Batch) -> Batch:
        """Counts a batch's records, and passes it on.

        Raises:
            CafeError: more than the set share of at least 100 records is bad, or all of the first 8 or more.
        """
        self.num_bad += len(batch.bad_records)
        self.num_records += len(batch.bad_records) + len(batch.record_names)
        if batch.bad_records:
            with self.file.open("a") as out:
                out.writelines(json.dumps({"reason": reason}) + "\n" for reason in batch.bad_records)
        if self.num_bad == self.num_records >= 8:
            named = f"{self.file} names them. The last: {batch.bad_records[-1]}"
            raise CafeError(f"All of the first {self.num_bad} records are bad; {named}")
        if self.num_records >= 100 and self.num_bad > self.max_bad_fraction * self.num_records:
            raise CafeError(
                f"{self.num_bad} of {self.num_records} records are bad, more than the share of {self.max_bad_fraction:.2%} "
                f"that data.max_bad_fraction allows; {self.file} names them. The last: {(batch.bad_records or ['none'])[-1]}"
            )
        return batch
