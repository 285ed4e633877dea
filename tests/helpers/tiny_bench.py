"""Arguments of tiny runs of the benchmark, and their records by optimizer."""

ONE = ["--device", "cpu", "--backend", "reference", "--flatten", "off"]
FEW = [*ONE, "--seconds", "0.05"]
TWO = ["--peers", "torch-fused,torch-single"]


def by_name(record):
    return {result["optimizer"]: result for result in record["results"]}
