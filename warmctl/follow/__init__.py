"""What moves with the rate: each follower is told every step's scale, and moves one thing accordingly.

In: the scale, the applied rate and the phase of a step. Out: a radius, a momentum, a decay, a difficulty; or readings.
May import: stability/, loss/ and the ground; neither the controller nor the wrapper. One follower a file.
"""
