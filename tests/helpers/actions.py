"""Actions on an optimizer class, whose outcomes on our class and on torch's are compared."""

import copy
import pickle
import warnings

import torch

nan, inf = float("nan"), float("inf")


def p(*shape, dtype=torch.float32, grad=True):
    """A parameter of ones, with a gradient of ones."""
    param = torch.ones(shape, dtype=dtype).requires_grad_()
    if grad:
        param.grad = torch.ones(shape, dtype=dtype)
    return param


def options(**arguments):
    """Construct, and return what was stored."""
    return lambda cls: {
        key: repr(value) for key, value in cls([p(2)], **arguments).defaults.items()
    }


def stepped(*params, steps=1, **arguments):
    """Construct over fresh copies of the parameters, step, and return parameters and state."""

    def action(cls):
        fresh = copy.deepcopy(list(params))
        for new, old in zip(fresh, params, strict=True):
            new.grad = old.grad
        optimizer = cls(fresh, **arguments)
        for _ in range(steps):
            optimizer.step()
        return snapshot(optimizer)

    return action


def snapshot(optimizer):
    """Values and layout of parameters and state; values rounded so that the last ulps of two paths
    agree.
    """

    def describe(t):
        t = t.detach()
        number = torch.view_as_real(t) if t.is_complex() else t
        return (
            t.dtype,
            tuple(t.shape),
            t.stride(),
            [round(x, 4) for x in number.double().flatten().tolist()],
        )

    return [
        (
            describe(param),
            {key: describe(value) for key, value in optimizer.state.get(param, {}).items()},
        )
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def groups_of(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def grouped(params, **arguments):
    return lambda cls: groups_of(cls(params() if callable(params) else params, **arguments))


def after(action):
    """Run `action(optimizer)` on an optimizer of two stepped parameters."""

    def run(cls):
        optimizer = cls([p(2), p(3)], lr=0.1)
        optimizer.step()
        return action(optimizer)

    return run


def strided(grad=True):
    param = torch.ones(4, 6)[:, ::2].requires_grad_()
    if grad:
        param.grad = torch.ones(4, 3)
    return param


def with_grad(param, grad):
    param.grad = grad
    return param


def late_group(optimizer):
    optimizer.add_param_group({"params": [p(4)], "lr": 0.5})
    optimizer.step()
    return snapshot(optimizer), groups_of(optimizer)


def listed_twice(cls):
    param = p(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = cls([param, param], lr=0.1)
        optimizer.step()
    return [str(w.message) for w in caught], snapshot(optimizer)


def hooks(optimizer):
    seen = []
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append((args[0] is o, list(kwargs)))
    )
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(len(args)))
    optimizer.step(closure=lambda: seen.append("closure"))
    return seen


def grad_mode_of_closure(optimizer):
    with torch.no_grad():
        return optimizer.step(torch.is_grad_enabled)


def reloaded(change):
    """Save after two steps, change the dict, load into a new optimizer, step once more."""

    def run(cls):
        optimizer = cls([p(2), p(3)], lr=0.1)
        optimizer.step()
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved = change(saved) or saved
        other = cls([p(2), p(3)], lr=0.7)
        other.load_state_dict(saved)
        other.step()
        return snapshot(other), groups_of(other)

    return run


def without(*keys):
    def change(saved):
        for group in saved["param_groups"]:
            for key in keys:
                group.pop(key, None)

    return change


def steps_as(kind):
    def change(saved):
        for entry in saved["state"].values():
            entry["step"] = kind(entry["step"])

    return change


def fresh_pickle(optimizer):
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.step()
    keys_are_params = all(
        any(key is q for g in twin.param_groups for q in g["params"]) for key in twin.state
    )
    return snapshot(twin), groups_of(twin), keys_are_params


def outcome(action, cls):
    """The action's result, or the error it raised; the class's own name and address taken out of
    texts.
    """
    name = cls.__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = action(cls)
    except Exception as error:
        result = (type(error).__name__, str(error))
    if isinstance(result, torch.optim.Optimizer):
        result = "an optimizer"
    return repr(result).replace(name, "Adam")
