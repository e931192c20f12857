"""LLVM's vector instructions on one number for each of eight images: what the CPU's kernels are written in."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

LANES = 8  # images in a vector
MARGIN = 4  # pixels by which a canvas is wider than the image: taps past its end wrap around when it is folded

FLOAT, INT, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def wide(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """A vector of ``lanes`` numbers of a kind."""
    return ir.VectorType(kind, lanes)


class Emit:
    """LLVM instructions on vectors of one number for each of eight images."""

    def __init__(self, context, builder, signature, arguments):
        self.context, self.builder = context, builder
        self.types, self.arguments = signature.args, arguments

    def data(self, position: int) -> ir.Value:
        """Pointer to the first element of the array that is argument number ``position``."""
        make = self.context.make_array(self.types[position])
        return make(self.context, self.builder, self.arguments[position]).data

    def load(self, pointer, offset, kind):
        """A value of ``kind`` that starts ``offset`` elements behind ``pointer``, at any alignment."""
        value = self.builder.load(self._at(pointer, offset, kind))
        value.align = 4
        return value

    def store(self, value, pointer, offset):
        """Write a value ``offset`` elements behind ``pointer``, at any alignment."""
        self.builder.store(value, self._at(pointer, offset, value.type)).align = 4

    def _at(self, pointer, offset, kind):
        return self.builder.bitcast(self.builder.gep(pointer, [offset]), kind.as_pointer())

    def spread(self, scalar, lanes: int = LANES):
        """The scalar in every lane."""
        kind = wide(scalar.type, lanes)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, INT(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(wide(INT, lanes), [0] * lanes))

    def constant(self, number: float):
        """The number in every lane."""
        return ir.Constant(wide(FLOAT), [number] * LANES)

    def floor(self, vector):
        """The next whole numbers below."""
        return self._call("llvm.floor.v8f32", vector)

    def multiply_add(self, a, b, c):
        """A * b + c."""
        return self._call(f"llvm.fmuladd.v{a.type.count}f32", a, b, c)

    def _call(self, name, *arguments):
        kind = ir.FunctionType(arguments[0].type, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def shuffle(self, a, b, *lanes):
        """A vector of these lanes of the two vectors, one behind the other."""
        return self.builder.shuffle_vector(a, b, ir.Constant(wide(INT, len(lanes)), list(lanes)))

    def polynomial(self, x, *coefficients):
        """Horner's scheme, highest power first."""
        value = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.multiply_add(value, x, self.constant(coefficient))
        return value

    def corners(self, cells, cell):
        """Offsets of a cell's four vertices in an array of 2 x 8 numbers a vertex."""
        width = LONG(2 * LANES)
        first = self.builder.mul(cell, LONG(4))
        rows = [self.load(cells, self.builder.add(first, LONG(k)), INT) for k in range(4)]
        return [self.builder.mul(self.builder.zext(row, LONG), width) for row in rows]

    def weights(self, bary, voxel):
        """A voxel's four barycentric weights, each in every lane."""
        first = self.builder.mul(voxel, LONG(4))
        return [self.spread(self.load(bary, self.builder.add(first, LONG(k)), FLOAT)) for k in range(4)]

    def stride(self) -> ir.Value:
        """Side of the eight canvases (8, stride, stride) that are the first argument."""
        make = self.context.make_array(self.types[0])
        return self.builder.extract_value(make(self.context, self.builder, self.arguments[0]).shape, 2)

    def locate(self, vertices, corners, weights, stride):
        """Fractions (x, y) of the voxel's position in eight images, and the offset of its pixel in their canvases."""
        builder = self.builder
        grid = builder.sub(stride, LONG(MARGIN))
        side = self.spread(builder.sitofp(grid, FLOAT))
        zero, inverse = self.constant(0.0), builder.fdiv(self.constant(1.0), side)
        fractions, pixels = [], []
        for axis in range(2):
            position = None
            for corner, weight in zip(corners, weights, strict=True):
                at = self.load(vertices, builder.add(corner, LONG(LANES * axis)), wide(FLOAT))
                position = builder.fmul(weight, at) if position is None else self.multiply_add(weight, at, position)
            turns = self.floor(builder.fmul(position, inverse))
            position = builder.fsub(position, builder.fmul(turns, side))
            # rounding may leave a position outside, far away by much; one that is no number becomes zero
            position = builder.select(builder.fcmp_ordered(">", position, zero), position, zero)
            position = builder.select(builder.fcmp_ordered("<", position, side), position, side)
            pixel = self.floor(position)
            fractions.append(builder.fsub(position, pixel))
            pixels.append(builder.fptosi(pixel, wide(INT)))
        rows = builder.mul(pixels[1], self.spread(builder.trunc(stride, INT)))
        return *fractions, builder.add(rows, pixels[0])

    def rows(self, offsets, lane: int, stride, taps: int):
        """Offsets of the first pixel of each of the kernel's rows in the canvas of one of the eight images."""
        builder = self.builder
        size = builder.mul(stride, stride)
        pixel = builder.zext(builder.extract_element(offsets, INT(lane)), LONG)
        first = builder.add(pixel, builder.mul(size, LONG(lane)))
        return [builder.add(first, builder.mul(stride, LONG(r))) for r in range(taps)]

    def kernel(self, taps: int, x):
        """The B-spline's values at its taps, 2 or 4 vectors."""
        if taps == 2:
            return [self.builder.fsub(self.constant(1.0), x), x]
        return [
            self.polynomial(x, -1 / 6, 0.5, -0.5, 1 / 6),
            self.polynomial(x, 0.5, -1.0, 0.0, 2 / 3),
            self.polynomial(x, -0.5, 0.5, 0.5, 1 / 6),
            self.polynomial(x, 1 / 6, 0.0, 0.0, 0.0),
        ]

    def kernel_slope(self, taps: int, x):
        """Its derivatives there."""
        if taps == 2:
            return [self.constant(-1.0), self.constant(1.0)]
        return [
            self.polynomial(x, -0.5, 1.0, -0.5),
            self.polynomial(x, 1.5, -2.0, 0.0),
            self.polynomial(x, -1.5, 1.0, 0.5),
            self.polynomial(x, 0.5, 0.0, 0.0),
        ]

    def by_lane(self, vectors):
        """2 or 4 vectors of eight images to eight short vectors, one an image."""
        if len(vectors) == 2:
            return [self.shuffle(*vectors, lane, LANES + lane) for lane in range(LANES)]
        pairs = [self.by_lane(vectors[:2]), self.by_lane(vectors[2:])]
        return [self.shuffle(a, b, 0, 1, 2, 3) for a, b in zip(*pairs, strict=True)]

    def by_tap(self, short):
        """The inverse: eight vectors, one an image, of 2 or 4 numbers to 2 or 4 vectors of eight images."""
        while len(short) > 1:
            width = 2 * short[0].type.count
            short = [self.shuffle(a, b, *range(width)) for a, b in zip(short[::2], short[1::2], strict=True)]
        taps = short[0].type.count // LANES
        return [self.shuffle(short[0], short[0], *range(tap, taps * LANES, taps)) for tap in range(taps)]

    def weighted(self, weights, vectors):
        """Sum of products."""
        total = self.builder.fmul(weights[0], vectors[0])
        for weight, vector in zip(weights[1:], vectors[1:], strict=True):
            total = self.multiply_add(weight, vector, total)
        return total
