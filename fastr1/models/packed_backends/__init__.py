"""What computes one part of packed attention, each with its log-sum-exp and a backward that takes another's.

A backend offers `HEAD_DIM_MULTIPLE`, of which its d is a multiple, and two functions of a `Part`, without dropout:

    forward(inputs, part, scale) → Outputs
    backward(grad_output, inputs, outputs, part, scale) → Inputs, the gradients

Gradients of keys that nothing asks for may be anything.
The outputs that the backward is given may belong to a softmax over more keys than this part's: the gradients are then
this part's share of it.
"""
