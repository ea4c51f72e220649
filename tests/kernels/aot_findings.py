"""What is wrong with a compiled kernel: by itself, and against an earlier report."""

import json

# A few registers, stored and loaded once: Blackwell's assembler spills as many with a hundred of them to spare.
NEGLIGIBLE_SPILL = 32
_MORE_REGISTERS = 32  # allowed against the report: between versions of Triton counts differed by up to 36
_FEWER_WIDE = 0.1  # share of accesses of 16 bytes that may be lost


def judged(kernel, smem_limit, mma, *, wide=0.0, spill=NEGLIGIBLE_SPILL):
    """Say what is wrong with a kernel.

    Args:
        kernel: Numbers of one kernel, as in a report.
        smem_limit: Bytes of shared memory that a program may have.
        mma: The matrix instruction that products are to use on this target.
        wide: Least share of loads that must be of 16 bytes.
        spill: Bytes of spilled registers that are put up with.
    """
    found = []
    if kernel["spill"] > spill:
        found.append(f"spills {kernel['spill']} bytes of registers, {spill} are allowed")
    if kernel["smem"] > smem_limit:
        found.append(f"takes {kernel['smem']} bytes of shared memory, the device has {smem_limit}")
    if kernel["product"] and kernel["mma"] not in _fitting(kernel["product"], mma):
        found.append(f"its product of {kernel['product']} uses {kernel['mma'] or 'no matrix instruction'}, not {mma}")
    if _share(kernel["loads"]) < wide:
        found.append(f"only {kernel['loads'][0]} of {kernel['loads'][1]} loads are of 16 bytes")
    return found


def _fitting(product, mma):
    """Matrix instructions that a product may use where a target has `mma`."""
    if product.endswith("f32") and mma != "MFMA":  # of full precision, which only AMD's instructions have
        return ("",)
    rows = int(product.split("x")[0])
    return (mma, "HMMA") if rows < 64 else (mma,)  # NVIDIA's instructions of whole groups of warps take 64 rows


def compared(kernels, before):
    """Say what got worse since a report: `kernels` and `before` are lists of numbers, one per kernel of one case."""
    names, names_before = ([k["kernel"] for k in rows] for rows in (kernels, before))
    if names != names_before:
        return [f"launches {', '.join(names)}, and {', '.join(names_before)} in the report"]
    found = []
    for now, old in zip(kernels, before, strict=True):
        worse = []
        if now["regs"] > old["regs"] + _MORE_REGISTERS:
            worse.append(f"registers from {old['regs']} to {now['regs']}")
        if now["spill"] > old["spill"] + NEGLIGIBLE_SPILL:
            worse.append(f"spilled bytes from {old['spill']} to {now['spill']}")
        if old["mma"] and now["mma"] != old["mma"]:
            worse.append(f"matrix instruction from {old['mma']} to {now['mma'] or 'none'}")
        for kind in ("loads", "stores"):
            if _share(now[kind]) < _share(old[kind]) - _FEWER_WIDE:
                worse.append(f"{kind} of 16 bytes from {old[kind][0]}/{old[kind][1]} to {now[kind][0]}/{now[kind][1]}")
        found += [f"{now['kernel']}: {what}" for what in worse]
    return found


def against(report, earlier, complete):
    """Say what got worse in a report since an earlier one; `complete`: whether it is to have all of its cases."""
    findings = []
    for target, now in report.items():
        before = earlier.get(target, {"triton": "of no version", "cases": {}})
        versions = f"triton {now['triton']}, in the report {before['triton']}"
        for name, rows in now["cases"].items():
            worse = compared(rows, before["cases"][name]) if name in before["cases"] else ["is not in the report"]
            findings += [f"{target} {name}: {what} ({versions})" for what in worse]
        gone = set(before["cases"]) - set(now["cases"]) if complete else ()
        findings += [f"{target} {name}: is in the report alone ({versions})" for name in sorted(gone)]
    return findings


def _share(accesses):
    wide, total = accesses
    return wide / total if total else 1.0


def read(path):
    """Read a report: by target, its version of Triton and the numbers of each case's kernels."""
    stored = json.loads(path.read_text())
    fields = stored.pop("fields")
    for part in stored.values():
        part["cases"] = {
            name: [dict(zip(fields, row, strict=True)) for row in rows] for name, rows in part["cases"].items()
        }
    return stored


def write(path, report):
    """Write a report, one line per case, in a stable order."""
    rows = [row for part in report.values() for rows in part["cases"].values() for row in rows]
    fields = list(rows[0]) if rows else []
    parts = [f' "fields": {json.dumps(fields)}']
    for target in sorted(report):
        cases = {
            name: [[row[field] for field in fields] for row in rows] for name, rows in report[target]["cases"].items()
        }
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(cases[name])}" for name in sorted(cases))
        head = f'"triton": {json.dumps(report[target]["triton"])}'
        parts.append(f' {json.dumps(target)}: {{{head}, "cases": {{\n{lines}\n }}}}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
