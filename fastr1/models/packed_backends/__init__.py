"""What computes one part of packed attention, each with its log-sum-exp and a backward that takes another's.

A backend offers `HEAD_DIM_MULTIPLE`, of which its d is a multiple, and two functions of a `Part`, on tokens one after
another, without dropout:

    forward(query (Tq, H, d), key (Tk, Hkv, d), value (Tk, Hkv, d), part, scale)
        → output (Tq, H, d), lse (H, Tq) float32, float64 for float64
    backward(grad_output, query, key, value, output, lse, part, scale)
        → gradients of query, key and value; those of keys that nothing asks for may be anything

Inputs may be views whose last dimension is contiguous. `output` and `lse` of the backward may belong to a softmax over
more keys than this part's: the gradients are then this part's share of it.
"""
