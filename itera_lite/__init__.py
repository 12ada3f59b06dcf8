"""Train, compress and measure small language models: `import itera_lite as il`, then `help(il.compress)`.

    il.load(folder)          a model with its tokenizer           il.train(text, out)       a new one, on your text
    il.compress(model)       a smaller one, by nine methods       il.plan(model, method)    what that would take
    il.evaluate(model)       bits per byte on held-out text       il.compare(model, small)  both, on the same text
    il.generate(model, "…")  a continuation                       il.save(model, folder)    a model folder
    il.export(model, file)   a graph for ONNX Runtime

Rooms: base, kernels, models, storage, checkpoints, evaluation, training, runtime, methods, jobs, reports, bench,
app.
"""

__version__ = "0.1.0"
__all__ = ["load", "train", "compress", "plan", "evaluate", "compare", "save", "export", "generate"]


def __getattr__(name):
    """The verbs, which need torch, when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module 'itera_lite' has no attribute '{name}'; it has {', '.join(__all__)}")
    import importlib
    globals()[name] = getattr(importlib.import_module("itera_lite.app.verbs"), name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})
