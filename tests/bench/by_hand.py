"""Results written by hand: as `moefold bench` writes them, with what tables read."""

from moefold.bench.results import KIND, SCHEMA


def results(*, threads=1, cpu="A CPU", date="2026-01-01", gpu=None, **parts):
    """A file of results with these parts."""
    where = {"cpu": cpu, "capability": "AVX2", "threads": threads, "date": date, "cores": 2}
    where |= {"versions": {"torch": "2.13.0"}, "commit": "abc" * 10, "uncommitted": False}
    where |= {"load_before": [0.5, 1, 1], "load_after": [1.25, 1, 1]}
    if gpu:
        where["gpu"] = gpu
    surrounded = {"kind": KIND, "schema": SCHEMA, "surroundings": where}
    settings = {"dtypes": ["fp32"], "clock": "cpu", "rounds": 7}
    return {**surrounded, "settings": settings, **parts}


def timed(variant, share, *, kind="peer", faster=1.0, memory=1.0):
    """A record of a variant with this share of the dense MLP's speed."""
    return {
        "variant": variant,
        "kind": kind,
        "both_of_dense": [share - 0.01, share, share + 0.02],
        "both_ours_faster": [faster, faster, faster],
        "memory": {"of_dense": memory},
    }


def layer(shape, dtype, *records):
    """One layer's records."""
    return {"shape": shape.to_dict(), "dtype": dtype, "records": list(records)}


def mine(share, memory=1.0):
    """Our record."""
    return timed("moefold", share, kind="ours", memory=memory)
