"""Stages `read` and `clean`: what is there, and which of it is fit.

`read` decodes every record once: it counts documents and rejects those that are none. `clean` makes each text canonical
and asks the rules. Neither writes text: sources are read again by the stages that need it, so no copy lies on disk.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

from data_prep.documents import KEPT, ROW, Job, cleaned, digest, reject_line
from data_prep.readers import Document, Reject, read_unit
from data_prep.rules import first_fault, rule_names
from data_prep.stages import Counts
from data_prep.storage import save_array, written_atomically

EMPTY = "empty_after_cleaning"  # a rule of its own: nothing but white space and control characters
_EXCERPT_CHARACTERS = 160
_DOCUMENT_BYTES = 512  # that stages hold of a document besides its text: short ones count for more than they weigh
_UNIT_TEXTS = 2  # a unit with more text than so many times unit_bytes is cut: an archive holds more than it weighs


def read_task(job: Job) -> Counts:
    """Count a unit's records; rejects go to a file of their own, with positions counted from the unit's start."""
    documents = rejected = text_bytes = held = 0
    records = 0  # of the last file: where a unit is part of a file, the next one counts on from it
    cuts: list[int] = []
    with written_atomically(job.path("read", "rejects.jsonl")) as rejects:
        for record in read_unit(job.source, job.unit, job.config.max_document_bytes):
            if held >= _UNIT_TEXTS * job.config.unit_bytes and len(job.unit.files) == 1:
                cuts.append(record.record)
                held = 0
            records = record.record + 1
            if isinstance(record, Document):
                documents += 1
                size = len(record.text) if record.text.isascii() else len(record.text.encode("utf-8"))
                text_bytes, held = text_bytes + size, held + size + _DOCUMENT_BYTES
            elif isinstance(record, Reject):
                rejected += 1
                line = {"file": record.file, "record": record.record, "reason": record.reason}
                rejects.write(json.dumps(line).encode() + b"\n")
    counts = {"documents": documents, "rejects": rejected, "bytes": text_bytes}
    return {"counts": counts, "records": records, "cuts": cuts}


def clean_task(job: Job) -> Counts:
    """One row and one fate a document: 0 for kept, else 1 + the number of the rule that spoke against it."""
    filters = job.config.filters_of(job.unit.source)
    fate_of = {name: number for number, name in enumerate(rule_names(filters), start=1)}
    rows: list[tuple[int, int, int, int, int]] = []
    fates, rules = bytearray(), Counter[str]()
    changed = kept_bytes = 0
    with written_atomically(job.path("clean", "rejects.jsonl")) as rejects:
        for record in read_unit(job.source, job.unit, job.config.max_document_bytes):
            if not isinstance(record, Document):
                continue
            text = cleaned(job.config, record)
            changed += text is not record.text and text != record.text
            data = text.encode("utf-8")
            rows.append((*digest(data, job.config.seed), record.file, record.record, len(data)))
            nothing = not text or text.isspace()
            fault = None if nothing else first_fault(text, filters)
            rule = EMPTY if nothing else fault.rule if fault else None
            if rule is None:
                fates.append(KEPT)
                kept_bytes += len(data)
                continue
            fates.append(fate_of.get(rule, 255))
            rules[rule] += 1
            reason = fault.detail if fault else "nothing is left of the text"
            place, excerpt = (record.file, record.record), text[:_EXCERPT_CHARACTERS]
            rejects.write(reject_line(job.config, job.unit, place, rule, reason, excerpt=excerpt))
    save_array(job.path("clean", "rows.npy"), np.array(rows, ROW))
    save_array(job.path("clean", "fates.npy"), np.frombuffer(fates, np.uint8))
    counts = {"documents": len(rows), "kept": len(rows) - rules.total(), "bytes": kept_bytes, "changed": changed}
    return {**counts, "rules": {name: rules[name] for name in (*fate_of, EMPTY) if name in fate_of or rules[name]}}
