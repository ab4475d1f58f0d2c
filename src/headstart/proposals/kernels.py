"""The compiled inner loops of :mod:`headstart.proposals.selective_search`. All of them live in this one file,
because numba's cache looks at one file only to see whether it is stale.

What makes them fast:

- Edges are 64-bit records, cost above, edge below, sorted by two counting passes.
- Union-find in blocks: a pass without branches looks up both roots of every edge of a block and drops edges
  that have become internal; what is left nearly always joins, so that the second pass predicts well.
- Unsigned indices: numba adds a test for negative ones to every access with a signed index.
- Rounds: the lightest edges join most pixels; of the next only those that still join two segments are sorted.
- A root's size and threshold side by side, in one cache line.
- Grouping: a tournament of each region's best pair, and bounds instead of most similarities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from headstart.proposals.compiled import entry, inlined, inner

ROUNDS = (0.2, 0.4, 0.65)  # share of the edges, the lightest first, that the rounds but the last end with
BLOCK = 512
LOW_DIGIT = np.uint64(13)  # bits of a key that are sorted first; then the others, at most 17
INFINITE_KEY = np.uint32(0x7F800000)
HIGHEST_KEY = np.uint32(0x40400001)  # squared costs end at 3
COUNTS = (1 << int(LOW_DIGIT)) + (int(HIGHEST_KEY) >> int(LOW_DIGIT)) + 1
LOW_32, SHIFT_32 = np.uint64(0xFFFFFFFF), np.uint64(32)
PIXEL_BITS, PIXEL_MASK = np.uint64(30), np.uint64(0x3FFFFFFF)
ONE = np.uint64(1)
COLOUR_BINS, TEXTURE_BINS = 25, 10
SLACK = 1e-9  # far above rounding in sums of at most 105 shares, so that bounds hold
# A corner neighbour of the LBP circle lies at cos(45 degrees), which skimage rounds to 5 digits. Times 2**16,
# rounded, the weights decide "neighbour >= centre" as the real numbers do for all 8-bit pixels (tested).
NEAR_WEIGHT, CORNER_WEIGHT = 13573, 32768
CORNER = 0.70711


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> Any:
    """float32 with these 32 bits; for positive numbers the order of the bits is that of the numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@inlined
def _places(mask, chosen):
    """Where ``mask`` (of 0 and 1) is 1, into ``chosen``, which is one longer; returns how many. Without a branch."""
    n = 0
    for i in range(len(mask)):
        chosen[n] = i
        n += mask[i]
    return n


# --- Segmentation: Felzenszwalb and Huttenlocher, IJCV 2004, as scikit-image computes it -----------------------


@inlined
def _reflect(i, n):  # (d c b a | a b c d | d c b a)
    i = i % (2 * n)
    return i if i < n else 2 * n - 1 - i


@inner
def _planes(image, padded):
    """(H, W, 3) -> (3, H + 2, W + 2) with a border of zeros."""
    height, width, _ = image.shape
    for channel in range(3):
        for x in range(width + 2):
            padded[channel, 0, x] = padded[channel, height + 1, x] = 0
        for y in range(height + 2):
            padded[channel, y, 0] = padded[channel, y, width + 1] = 0
    for y in range(height):
        row = image[y]
        red, green, blue = padded[0, y + 1], padded[1, y + 1], padded[2, y + 1]
        for x in range(width):
            red[x + 1] = row[x, 0]
            green[x + 1] = row[x, 1]
            blue[x + 1] = row[x, 2]


@inner
def _blur(padded, weights, out):
    """Gaussian of pixels / 255, (3, H, W) float64; additions in scipy.ndimage's order, for its very bits.

    weights: centre first; its length - 1 is the radius.
    """
    radius = len(weights) - 1
    _, height, width = out.shape
    rows = 2 * radius + 1
    ring = np.empty((rows, width), np.float64)
    wide = np.empty(width + 2 * radius, np.float64)
    middle = wide[radius : radius + width]
    unit = 1.0 / 255.0
    for channel in range(3):
        for ahead in range(-radius, height + radius):
            source = padded[channel, _reflect(ahead, height) + 1, 1 : width + 1]
            new = ring[(ahead + rows) % rows]
            for x in range(width):
                new[x] = source[x] * unit
            y = ahead - radius
            if y < 0:
                continue
            centre, weight = ring[y % rows], weights[0]
            for x in range(width):
                middle[x] = centre[x] * weight
            k = radius
            while k > 1:  # two at a time: half the traffic
                above, below, weight = ring[(y - k + rows) % rows], ring[(y + k) % rows], weights[k]
                above_2, below_2, weight_2 = ring[(y - k + 1 + rows) % rows], ring[(y + k - 1) % rows], weights[k - 1]
                for x in range(width):
                    middle[x] = (middle[x] + (above[x] + below[x]) * weight) + (above_2[x] + below_2[x]) * weight_2
                k -= 2
            if k == 1:
                above, below, weight = ring[(y - 1 + rows) % rows], ring[(y + 1) % rows], weights[1]
                for x in range(width):
                    middle[x] += (above[x] + below[x]) * weight
            for k in range(1, radius + 1):
                wide[radius - k] = middle[_reflect(-k, width)]
                wide[radius + width - 1 + k] = middle[_reflect(width - 1 + k, width)]
            result, weight = out[channel, y], weights[0]
            for x in range(width):
                result[x] = middle[x] * weight
            k = radius
            while k > 1:
                left, right, weight = wide[radius - k :], wide[radius + k :], weights[k]
                left_2, right_2, weight_2 = wide[radius - k + 1 :], wide[radius + k - 1 :], weights[k - 1]
                for x in range(width):
                    result[x] = (result[x] + (left[x] + right[x]) * weight) + (left_2[x] + right_2[x]) * weight_2
                k -= 2
            if k == 1:
                left, right, weight = wide[radius - 1 :], wide[radius + 1 :], weights[1]
                for x in range(width):
                    result[x] += (left[x] + right[x]) * weight


@inner
def _row_costs(r0, g0, b0, r1, g1, b1, out):
    for x in range(len(out)):
        r, g, b = r1[x] - r0[x], g1[x] - g0[x], b1[x] - b0[x]
        out[x] = np.float32(r * r + g * g + b * b)


@inner
def _edge_costs(blurred, costs):
    """Squared costs (4, H, W) float32 of a pixel's edges: right, down, down-right, down-left; else infinite."""
    _, height, width = blurred.shape
    last = width - 1
    for y in range(height):
        r0, g0, b0 = blurred[0, y], blurred[1, y], blurred[2, y]
        _row_costs(r0[:last], g0[:last], b0[:last], r0[1:], g0[1:], b0[1:], costs[0, y, :last])
        costs[0, y, last] = np.inf
        if y + 1 == height:
            for x in range(width):
                costs[1, y, x] = costs[2, y, x] = costs[3, y, x] = np.inf
            break
        r1, g1, b1 = blurred[0, y + 1], blurred[1, y + 1], blurred[2, y + 1]
        _row_costs(r0, g0, b0, r1, g1, b1, costs[1, y])
        _row_costs(r0[:last], g0[:last], b0[:last], r1[1:], g1[1:], b1[1:], costs[2, y, :last])
        costs[2, y, last] = np.inf
        _row_costs(r0[1:], g0[1:], b0[1:], r1[:last], g1[:last], b1[:last], costs[3, y, 1:])
        costs[3, y, 0] = np.inf


@inner
def _cuts(keys, cuts):
    """Keys with about the shares ``ROUNDS`` of the edges below them, from a sample."""
    counts = np.zeros(0x8000, np.int32)
    total = 0
    for direction in range(4):
        row = keys[direction]
        for p in range(direction, len(row), 17):
            key = row[p]
            if key < INFINITE_KEY:
                counts[key >> np.uint32(16)] += 1
                total += 1
    below = 0
    found = 0
    for i in range(len(cuts)):
        cuts[i] = HIGHEST_KEY
    for i in range(0x8000):
        below += counts[i]
        while found < len(ROUNDS) and below >= ROUNDS[found] * total:
            cuts[found] = min(np.uint32((i + 1) << 16), HIGHEST_KEY)
            found += 1


@inner
def _lightest(keys, cut, records):
    n = 0
    for direction in range(4):
        row = keys[direction]
        for p in range(len(row)):
            key = row[p]
            records[n] = (np.uint64(key) << SHIFT_32) | np.uint64((direction << 30) | p)
            n += key < cut
    return n


@inner
def _next(keys, low, high, parent, offsets, records):
    """Edges with ``low <= key < high`` that join two segments (``parent``: flat), in the order of the edges."""
    n = 0
    width = 2048
    joins = np.empty(width, np.uint8)
    chosen = np.empty(width + 1, np.int32)
    for direction in range(4):
        offset = np.int64(offsets[direction])
        for start in range(0, keys.shape[1] - offset, width):
            size = min(width, keys.shape[1] - offset - start)
            row = keys[direction, start : start + size]
            here, there = parent[start : start + size], parent[start + offset : start + offset + size]
            for p in range(size):
                joins[p] = (here[p] != there[p]) & (row[p] >= low) & (row[p] < high)
            m = _places(joins[:size], chosen)
            edge = (direction << 30) | start
            for i in range(m):
                p = chosen[i]
                records[n + i] = (np.uint64(row[p]) << SHIFT_32) | np.uint64(edge + p)
            n += m
    return n


@inner
def _sort(records, spare, counts, low, high):
    """By key, stable: two counting passes. Keys lie in [low, high)."""
    lowest = np.uint64(low)
    n_low, n_high = 1 << np.int64(LOW_DIGIT), np.int64((np.uint64(high) - lowest) >> LOW_DIGIT) + 1
    mask = (ONE << LOW_DIGIT) - ONE
    first, second = counts[:n_low], counts[n_low : n_low + n_high]
    for d in range(n_low + n_high):
        counts[d] = 0
    for i in range(len(records)):
        key = (records[i] >> SHIFT_32) - lowest
        first[key & mask] += np.uint32(1)
        second[key >> LOW_DIGIT] += np.uint32(1)
    place = np.uint32(0)
    for d in range(len(first)):
        first[d], place = place, place + first[d]
    place = np.uint32(0)
    for d in range(n_high):
        second[d], place = place, place + second[d]
    for i in range(len(records)):
        record = records[i]
        d = ((record >> SHIFT_32) - lowest) & mask
        spare[first[d]] = record
        first[d] += np.uint32(1)
    for i in range(len(records)):
        record = spare[i]
        d = ((record >> SHIFT_32) - lowest) >> LOW_DIGIT
        records[second[d]] = record
        second[d] += np.uint32(1)


@inlined
def _cost(blurred, edge, offsets):
    """The exact cost: as scikit-image computes it, in float64."""
    u = edge & PIXEL_MASK
    v = u + offsets[edge >> PIXEL_BITS]
    r, g, b = blurred[0, v] - blurred[0, u], blurred[1, v] - blurred[1, u], blurred[2, v] - blurred[2, u]
    return np.sqrt(r * r + g * g + b * b)


@inner
def _equal_to_next(records, start, chosen):
    """Places from ``start`` on (at most ``len(chosen) - 1`` are looked at) where the next record has the same key."""
    size = min(len(chosen) - 1, len(records) - 1 - start)
    here, following = records[start : start + size], records[start + 1 : start + 1 + size]
    n = 0
    for i in range(size):
        chosen[n] = start + i
        n += (here[i] ^ following[i]) <= LOW_32
    return n


@inner
def _sort_ties(records, blurred, offsets):
    """Put records with equal keys in the order of their exact costs, then edges. Key 0 is cost 0."""
    chosen = np.empty(2048, np.int64)
    n = len(records)
    done = 0
    while done < n and records[done] <= LOW_32:
        done += 1
    for start in range(0, n - 1, len(chosen) - 1):
        for i in range(_equal_to_next(records, start, chosen)):
            first = chosen[i]
            if first >= done:
                done = first + 2
                while done < n and (records[done] ^ records[first]) <= LOW_32:
                    done += 1
                _sort_run(records[first:done], blurred, offsets)


@inner
def _sort_run(records, blurred, offsets):
    n = len(records)
    if n == 2:  # nearly all
        if _cost(blurred, records[1] & LOW_32, offsets) < _cost(blurred, records[0] & LOW_32, offsets):
            records[0], records[1] = records[1], records[0]
        return
    costs = np.empty(n, np.float64)
    rising = True
    for i in range(n):
        costs[i] = _cost(blurred, records[i] & LOW_32, offsets)
        rising &= i == 0 or costs[i - 1] <= costs[i]
    if rising:  # the edges rise, too: the sort before was stable
        return
    gap = n
    while gap > 1:  # Shell's sort: a run is short, as a rule
        gap = 1 if gap == 2 else gap * 5 // 11
        for i in range(gap, n):
            cost, record, j = costs[i], records[i], i
            edge = record & LOW_32
            while j >= gap and (
                costs[j - gap] > cost or (costs[j - gap] == cost and (records[j - gap] & LOW_32) > edge)
            ):
                costs[j], records[j] = costs[j - gap], records[j - gap]
                j -= gap
            costs[j], records[j] = cost, record


@inner
def _join(records, parent, nodes, thresholds, last_edge, offsets, scale, blurred, rejected):
    """Join segments along ``records`` where the cost is below both thresholds; returns the number rejected.

    Of a root r, ``nodes[2r]`` is its size, ``thresholds[2r + 1]`` (the same memory as float32) its threshold
    squared, and ``last_edge[r]`` the edge that joined it last, whose cost is the inner cost. Comparing squared
    float32 numbers decides all but the closest cases; those are decided by the exact numbers.
    ``rejected`` may be the same memory as ``records``: it is written behind what was read.
    """
    root_u, root_v = np.empty(BLOCK + 1, np.uint32), np.empty(BLOCK + 1, np.uint32)
    open_ = np.empty(BLOCK + 1, np.uint64)
    scale_32 = np.float32(scale)
    n_rejected = 0
    for start in range(0, len(records), BLOCK):
        n = 0
        for i in range(start, min(len(records), start + BLOCK)):
            record = records[i]
            u = record & PIXEL_MASK
            v = u + offsets[(record & LOW_32) >> PIXEL_BITS]
            a, b = parent[parent[u]], parent[parent[v]]
            parent[u], parent[v] = a, b
            a, b = parent[a], parent[b]
            root_u[n], root_v[n], open_[n] = a, b, record
            n += a != b
        for i in range(n):
            a, b = root_u[i], root_v[i]
            while parent[a] != a:
                a = parent[a]
            while parent[b] != b:
                b = parent[b]
            if a == b:
                continue
            record = open_[i]
            squared = _float_of(np.uint32(record >> SHIFT_32))
            at_a, at_b = np.uint64(a) << ONE, np.uint64(b) << ONE
            threshold = min(thresholds[at_a + ONE], thresholds[at_b + ONE])
            size_a, size_b = nodes[at_a], nodes[at_b]
            if squared > threshold * np.float32(0.99999):
                below = False
                if squared < threshold * np.float32(1.00001):
                    cost = _cost(blurred, record & LOW_32, offsets)
                    inner_a = _cost(blurred, np.uint64(last_edge[a]), offsets) if size_a > 1 else 0.0
                    inner_b = _cost(blurred, np.uint64(last_edge[b]), offsets) if size_b > 1 else 0.0
                    below = cost < min(np.float32(inner_a + scale / size_a), np.float32(inner_b + scale / size_b))
                if not below:
                    rejected[n_rejected] = record
                    n_rejected += 1
                    continue
            if size_a < size_b:
                a, b, at_a = b, a, at_b
            parent[b] = a
            size = size_a + size_b
            threshold = np.sqrt(squared) + scale_32 / np.float32(size)
            nodes[at_a] = size
            thresholds[at_a + ONE] = threshold * threshold
            last_edge[a] = np.uint32(record & LOW_32)
    return n_rejected


@inner
def _flatten(parent):
    for i in range(len(parent)):
        p = parent[parent[parent[i]]]
        while parent[p] != p:
            p = parent[p]
        parent[i] = p


@inner
def _join_small(rejected, parent, nodes, offsets, min_size):
    """Join segments of fewer than ``min_size`` px along the cheapest edges left (``parent``: flat)."""
    n = 0
    for i in range(len(rejected)):
        record = rejected[i]
        u = record & PIXEL_MASK
        a, b = parent[u], parent[u + offsets[(record & LOW_32) >> PIXEL_BITS]]
        rejected[n] = record
        n += (a != b) & (min(nodes[np.uint64(a) << ONE], nodes[np.uint64(b) << ONE]) < min_size)
    for i in range(n):
        record = rejected[i]
        u = record & PIXEL_MASK
        a, b = parent[u], parent[u + offsets[(record & LOW_32) >> PIXEL_BITS]]
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        size_a, size_b = nodes[np.uint64(a) << ONE], nodes[np.uint64(b) << ONE]
        if a != b and min(size_a, size_b) < min_size:
            if size_a < size_b:
                a, b = b, a
            parent[b] = a
            nodes[np.uint64(a) << ONE] = size_a + size_b


@entry
def segment(
    image, scale, min_size, weights, padded, blurred, keys, records, spare, counts, parent, nodes, last_edge, labels
):
    """Segments of an image, numbered by their first pixels row by row; returns how many.

    Args:
        image: (H, W, 3) uint8.
        scale: skimage's scale / 255.
        weights: of the Gaussian, centre first.
        padded: (3, H + 2, W + 2) uint8: gets the image and a border of zeros.
        blurred: (3, H, W) float64; keys: (4, H * W) uint32; records, spare: (4 * H * W + 1,) uint64;
        counts: (COUNTS,) uint32;
        parent, last_edge: (H * W,) uint32; nodes: (2 * H * W,) uint32: memory to work in.
        labels: (H, W) int32: the result.
    """
    height, width, _ = image.shape
    pixels = height * width
    _planes(image, padded)
    _blur(padded, weights, blurred)
    _edge_costs(blurred, keys.view(np.float32).reshape(4, height, width))
    flat = blurred.reshape(3, pixels)
    thresholds = nodes.view(np.float32)
    offsets = np.array([1, width, width + 1, width - 1], np.uint64)
    nodes[0], thresholds[1] = 1, scale * scale
    both = nodes.view(np.uint64)
    single = both[0]
    for p in range(pixels):
        parent[p] = p
        both[p] = single
    cuts = np.empty(len(ROUNDS) + 1, np.uint32)
    _cuts(keys, cuts)
    n_rejected = 0
    low = np.uint32(0)
    for turn in range(len(cuts)):
        left = records[n_rejected:]
        n = _lightest(keys, cuts[0], left) if turn == 0 else _next(keys, low, cuts[turn], parent, offsets, left)
        left = left[:n]
        _sort(left, spare, counts, low, cuts[turn])
        _sort_ties(left, flat, offsets)
        n_rejected += _join(left, parent, nodes, thresholds, last_edge, offsets, scale, flat, left)
        _flatten(parent)
        low = cuts[turn]
    if min_size > 1:
        _join_small(records[:n_rejected], parent, nodes, offsets, np.uint32(min_size))
    number = last_edge  # from here on: of the segment with this root, from 1
    for p in range(pixels):
        number[p] = 0
    count = np.uint32(0)
    label = labels.reshape(pixels)
    for p in range(pixels):
        root = parent[parent[p]]
        while parent[root] != root:
            root = parent[root]
        if number[root] == 0:
            count += np.uint32(1)
            number[root] = count
        label[p] = number[root] - np.uint32(1)
    return np.int64(count)


# --- What the segments look like ------------------------------------------------------------------------------


@inlined
def _corner(near_sum, corner, centre):
    """65536 times (bilinear value at the circle's corner - centre), exact in sign; 0 only for "equal"."""
    return NEAR_WEIGHT * (near_sum - 2 * centre) + CORNER_WEIGHT * (corner - centre)


@inner
def _local_binary_patterns(padded, codes):
    """(3, H + 2, W + 2) -> (3, H, W): bit i is set where neighbour i on the circle is at least the centre.

    Eight neighbours at radius 1, counted from the right against the clock; outside the image is 0, as in
    scikit-image. Unlike there, a flat area has all bits set whatever its place: nothing is rounded.
    """
    _, height, width = codes.shape
    for channel in range(3):
        plane = padded[channel]
        for y in range(height):
            up, mid, down = plane[y], plane[y + 1], plane[y + 2]
            out = codes[channel, y]
            for x in range(width):
                centre = np.int32(mid[x + 1])
                left, right = np.int32(mid[x]), np.int32(mid[x + 2])
                above, below = np.int32(up[x + 1]), np.int32(down[x + 1])
                code = np.int32(right >= centre)
                code |= np.int32(_corner(above + right, np.int32(up[x + 2]), centre) >= 0) << 1
                code |= np.int32(above >= centre) << 2
                code |= np.int32(_corner(above + left, np.int32(up[x]), centre) >= 0) << 3
                code |= np.int32(left >= centre) << 4
                code |= np.int32(_corner(below + left, np.int32(down[x]), centre) >= 0) << 5
                code |= np.int32(below >= centre) << 6
                code |= np.int32(_corner(below + right, np.int32(down[x + 2]), centre) >= 0) << 7
                out[x] = code


@inner
def _reaches(plane, y, x, step_y, step_x):
    """The reference's own arithmetic for one corner, where it rounds: value - centre >= 0."""
    row, column = y + step_y * CORNER, x + step_x * CORNER
    y0, x0 = np.int64(np.floor(row)), np.int64(np.floor(column))
    dy, dx = row - y0, column - x0
    top = (1 - dx) * plane[y0 + 1, x0 + 1] + dx * plane[y0 + 1, x0 + 2]
    bottom = (1 - dx) * plane[y0 + 2, x0 + 1] + dx * plane[y0 + 2, x0 + 2]
    return (1 - dy) * top + dy * bottom - plane[y + 1, x + 1] >= 0


@inner
def _count_exact(padded, labels, value_bin, counts):
    """Per segment: pixels in 25 bins of V, then of each channel those with pattern 0 and with pattern 1.

    That is all the reference's histograms hold: H and S (0..1) fall into the first of 25 bins over 0..255, and
    of the patterns 0..255 only 0 and 1 lie in its bins over 0..1. A pattern is 0 or 1 where every neighbour but
    perhaps the right one is darker than the centre.
    """
    height, width = labels.shape
    flat, n_bins = counts.reshape(counts.size), np.uint64(counts.shape[1])
    peak = np.empty(width, np.uint8)
    chosen = np.empty(width + 1, np.int32)
    for y in range(height):
        row = labels[y]
        red, green, blue = padded[0, y + 1, 1:], padded[1, y + 1, 1:], padded[2, y + 1, 1:]
        for x in range(width):
            peak[x] = max(red[x], max(green[x], blue[x]))
        for x in range(width):
            flat[np.uint64(row[x]) * n_bins + value_bin[peak[x]]] += np.int32(1)
        for channel in range(3):
            plane = padded[channel]
            up, mid, down = plane[y], plane[y + 1], plane[y + 2]
            left, centre, above, below = mid[:width], mid[1 : width + 1], up[1 : width + 1], down[1 : width + 1]
            for x in range(width):
                peak[x] = (left[x] < centre[x]) & (above[x] < centre[x]) & (below[x] < centre[x])
            n = _places(peak, chosen)
            for i in range(n):
                x = chosen[i]
                c, r = np.int64(mid[x + 1]), np.int64(mid[x + 2])
                a, b, le = np.int64(up[x + 1]), np.int64(down[x + 1]), np.int64(mid[x])
                up_right = _corner(a + r, np.int64(up[x + 2]), c)
                down_right = _corner(b + r, np.int64(down[x + 2]), c)
                if (
                    up_right > 0
                    or down_right > 0
                    or _corner(a + le, np.int64(up[x]), c) >= 0
                    or _corner(b + le, np.int64(down[x]), c) >= 0
                ):
                    continue
                if up_right == 0 and _reaches(plane, y, x, -1, 1):
                    continue
                if down_right == 0 and _reaches(plane, y, x, 1, 1):
                    continue
                flat[np.uint64(row[x]) * n_bins + np.uint64(COLOUR_BINS + 2 * channel + (r >= c))] += np.int32(1)


@entry
def hsv_bins(padded, value_bin, bins):
    """Bins of H, S and V, 25 each, of (3, H + 2, W + 2) pixels, into (3, H, W).

    ``value_bin``: (256,) the bin of every V. Quotients of these small integers, rounded to float32, never cross a
    bin's edge.
    """
    _, height, width = bins.shape
    for y in range(height):
        red, green, blue = padded[0, y + 1, 1:], padded[1, y + 1, 1:], padded[2, y + 1, 1:]
        hue, saturation, value = bins[0, y], bins[1, y], bins[2, y]
        for x in range(width):
            r, g, b = np.int32(red[x]), np.int32(green[x]), np.int32(blue[x])
            top = max(r, max(g, b))
            span = top - min(r, min(g, b))
            turn = g - b if r == top else (b - r + 2 * span if g == top else r - g + 4 * span)
            turn = turn + 6 * span if turn < 0 else turn
            of = np.float32(max(span, 1) * 6)
            hue[x] = np.uint8(np.float32(turn * COLOUR_BINS) / of)
            saturation[x] = min(
                np.uint8(np.float32(span * COLOUR_BINS) / np.float32(max(top, 1))), np.uint8(COLOUR_BINS - 1)
            )
            value[x] = value_bin[top]


@entry
def even_bins(padded, bins):
    """25 even bins of 0..255 for each channel of (3, H + 2, W + 2) pixels, into (3, H, W)."""
    _, height, width = bins.shape
    for channel in range(3):
        for y in range(height):
            plane, out = padded[channel, y + 1, 1:], bins[channel, y]
            for x in range(width):
                out[x] = np.uint8((np.int32(plane[x]) * COLOUR_BINS) >> 8)


@inner
def _count(bins, codes, labels, counts):
    """Per segment: pixels in 25 bins of each colour channel, then in 10 bins of each channel's patterns."""
    height, width = labels.shape
    flat, n_bins = counts.reshape(counts.size), np.uint64(counts.shape[1])
    ten = np.uint64(TEXTURE_BINS)
    for y in range(height):
        row = labels[y]
        for channel in range(3):
            bin_, code = bins[channel, y], codes[channel, y]
            colour = np.uint64(channel * COLOUR_BINS)
            texture = np.uint64(3 * COLOUR_BINS + channel * TEXTURE_BINS)
            for x in range(width):
                start = np.uint64(row[x]) * n_bins
                flat[start + colour + bin_[x]] += np.int32(1)
                flat[start + texture + ((np.uint64(code[x]) * ten) >> np.uint64(8))] += np.int32(1)


@inner
def _boxes(labels, boxes):
    """First and last column and row of each segment: (n, 4) int32 x1, y1, x2, y2, both inclusive."""
    height, width = labels.shape
    for i in range(len(boxes)):
        boxes[i, 0] = boxes[i, 1] = max(height, width)
        boxes[i, 2] = boxes[i, 3] = -1
    for y in range(height):
        row = labels[y]
        x = 0
        while x < width:
            label, start = row[x], x
            while x < width and row[x] == label:
                x += 1
            box = boxes[label]
            box[0] = min(box[0], start)
            box[1] = min(box[1], y)
            box[2] = max(box[2], x - 1)
            box[3] = y


@entry
def describe(padded, labels, n, exact, value_bin, bins, codes, histograms, sizes, boxes):
    """Histograms (each channel's sums to 1), sizes in px and boxes of the n segments in ``labels``.

    Args:
        padded: (3, H + 2, W + 2) uint8, zeros around the image.
        labels: (H, W) int32.
        exact: as the reference counts, see :func:`_count_exact`, or correctly.
        value_bin: (256,) bin of a value V in the reference.
        bins: (3, H, W) uint8 colour bins, read unless exact; codes: (3, H, W) uint8 to work in.
        histograms: (>= n, B) float64; sizes: (>= n,) int32; boxes: (>= n, 4) int32: the results.
    """
    counts = np.zeros((n, histograms.shape[1]), np.int32)
    if exact:
        _count_exact(padded, labels, value_bin, counts)
    else:
        _local_binary_patterns(padded, codes)
        _count(bins, codes, labels, counts)
    for i in range(n):
        size = 0
        for j in range(COLOUR_BINS):
            size += counts[i, j]
        sizes[i] = size
        for j in range(counts.shape[1]):
            histograms[i, j] = counts[i, j] / size
    _boxes(labels, boxes[:n])


# --- Which segments may be grouped, and grouping: Uijlings et al., IJCV 2013 -----------------------------------


@entry
def overlapping(boxes, n):
    """Pairs (P, 2), a before b, where a corner of b's box lies strictly inside a's: the reference's neighbours."""
    sides = np.empty((4, n), np.int32)
    for i in range(n):
        for j in range(4):
            sides[j, i] = boxes[i, j]
    x1, y1, x2, y2 = sides[0], sides[1], sides[2], sides[3]
    inside = np.empty(n, np.uint8)
    pairs = np.empty((4 * n + 64, 2), np.int32)
    m = 0
    for a in range(n - 1):
        left, top, right, bottom = x1[a], y1[a], x2[a], y2[a]
        for b in range(a + 1, n):
            inside[b] = (((left < x1[b]) & (x1[b] < right)) | ((left < x2[b]) & (x2[b] < right))) & (
                ((top < y1[b]) & (y1[b] < bottom)) | ((top < y2[b]) & (y2[b] < bottom))
            )
        if m + n > len(pairs):
            fewer, pairs = pairs, np.empty((2 * (m + n), 2), np.int32)
            for i in range(m):
                pairs[i, 0], pairs[i, 1] = fewer[i, 0], fewer[i, 1]
        for b in range(a + 1, n):
            pairs[m, 0], pairs[m, 1] = a, b
            m += inside[b]
    return pairs[:m]


@entry
def adjacent(labels, n):
    """Pairs (P, 2), a < b, in rising order, of segments with pixels that touch, corners included."""
    height, width = labels.shape
    table = np.full(1024, -1, np.int64)  # open addressing, at most half full
    found = 0
    last = np.int64(-1)
    borders = np.empty(width, np.uint8)
    chosen = np.empty(width + 1, np.int32)
    for y in range(height):
        row, below = labels[y], labels[min(y + 1, height - 1)]
        borders[width - 1] = row[width - 1] != below[width - 1]
        following, below_following = row[1:], below[1:]
        for x in range(width - 1):
            borders[x] = (row[x] != following[x]) | (row[x] != below[x]) | (row[x] != below_following[x])
        m = _places(borders, chosen)
        for i in range(m):
            x = chosen[i]
            after = min(x + 1, width - 1)
            for k in range(4):  # right, below, and the two diagonals of these four pixels
                here = row[after] if k == 3 else row[x]
                other = row[after] if k == 0 else (below[after] if k == 2 else below[x])
                key = np.int64(min(here, other)) * n + max(here, other)
                if other == here or key == last:
                    continue
                last = key
                if 2 * found >= len(table):
                    old = table
                    table = np.full(4 * len(old), -1, np.int64)
                    for kept in old:
                        if kept >= 0:
                            table[_place(table, kept)] = kept
                place = _place(table, key)
                found += table[place] < 0
                table[place] = key
    keys = np.sort(table[table >= 0])
    pairs = np.empty((found, 2), np.int32)
    for i in range(found):
        pairs[i, 0], pairs[i, 1] = keys[i] // n, keys[i] % n
    return pairs


@inlined
def _place(table, key):
    mask = np.uint64(len(table) - 1)
    place = ((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while table[place] >= 0 and table[place] != key:
        place = (place + ONE) & mask
    return place


@inner
def _alike(a, b, histograms, n_colour, sure, weights):
    """What two regions' histograms share, summed in the reference's order: colour, then texture."""
    of_a, of_b = histograms[a], histograms[b]
    colour = sure
    for j in range(n_colour):
        colour += of_a[j] if of_a[j] < of_b[j] else of_b[j]
    texture = 0.0
    for j in range(n_colour, len(of_a)):
        texture += of_a[j] if of_a[j] < of_b[j] else of_b[j]
    return weights[0] * colour + weights[1] * texture


@inlined
def _similarity(alike, a, b, sizes, boxes, pixels, weights):
    width = max(boxes[a, 2], boxes[b, 2]) - min(boxes[a, 0], boxes[b, 0])
    height = max(boxes[a, 3], boxes[b, 3]) - min(boxes[a, 1], boxes[b, 1])
    both = np.int64(sizes[a]) + sizes[b]
    size = 1.0 - both / pixels
    fill = 1.0 - (np.int64(width) * height - both) / pixels
    return alike + weights[2] * size + weights[3] * fill


@inner
def _gain(new, old, histograms, n_colour, weights):
    """At most so much more than ``old`` can ``new`` share with any third region."""
    colour = texture = 0.0
    for j in range(n_colour):
        colour += max(histograms[new, j] - histograms[old, j], 0.0)
    for j in range(n_colour, histograms.shape[1]):
        texture += max(histograms[new, j] - histograms[old, j], 0.0)
    return weights[0] * colour + weights[1] * texture + SLACK


@entry
def group(pairs, n, histograms, n_colour, sure, sizes, boxes, pixels, weights):
    """Merge the most similar pair of neighbours until none is left; returns the number of regions.

    A new region's neighbours are those of the two it is made of, in the order in which the pairs came to be;
    of equally similar pairs the youngest is merged, as in the reference.

    Histograms are compared only for pairs that may be the most similar: a new pair starts with an upper bound,
    what its neighbour shared with the old region plus what the new one gained over it.

    Args:
        pairs: (P, 2) int32 of segments; those with the same first one lie together.
        n: number of segments; the regions that are made get the numbers from n on, at most 2 * n - 1.
        histograms: (2 * n, B) float64; sizes: (2 * n,); boxes: (2 * n, 4): of the segments, gets the regions'.
        n_colour: the first of the B bins that are colour; sure: colour similarity that any pair has besides.
        pixels: of the image.
        weights: (4,) of colour, texture, size, fill.
    """
    capacity = max(4 * len(pairs), 1 << 16)
    owner, partner = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    alike, similarity = np.empty(capacity, np.float64), np.empty(capacity, np.float64)  # or upper bounds,
    bound = np.empty(capacity, np.uint8)  # where this is 1
    following = np.empty(capacity, np.int32)
    total = 2 * n
    alive = np.zeros(total, np.uint8)
    first, stop = np.empty(total, np.int32), np.empty(total, np.int32)  # the pairs a region owns
    head, tail = np.empty(total, np.int32), np.empty(total, np.int32)  # a list of those it is partner in
    best = np.empty(total, np.float64)  # of its own pairs, or more: pairs die unnoticed
    best_pair = np.empty(total, np.int32)
    pair_with = np.full(total, -1, np.int32)  # region -> its pair with the newest region
    none = np.int32(0x7FFFFFFF)
    a_pixel = 1.0 / pixels
    count = len(pairs)
    for i in range(n):
        alive[i] = 1
    for i in range(count):
        a, b = pairs[i, 0], pairs[i, 1]
        owner[i], partner[i], bound[i] = a, b, 0
        alike[i] = _alike(a, b, histograms, n_colour, sure, weights)
        similarity[i] = _similarity(alike[i], a, b, sizes, boxes, pixels, weights)
    _index(owner, partner, similarity, following, count, first, stop, head, tail, best, best_pair)
    winners = np.zeros(2 * total, np.int32)  # a tournament of all regions by their best pairs
    for region in range(total):
        winners[total + region] = region
    for i in range(total - 1, 0, -1):
        winners[i] = _better(winners[2 * i], winners[2 * i + 1], best, best_pair)
    new = n
    while new < total - 1:
        chosen = np.int32(-1)
        while True:
            chosen = best_pair[winners[1]]
            if chosen < 0:
                break
            a, b = owner[chosen], partner[chosen]
            if alive[b]:
                if not bound[chosen]:
                    break
                alike[chosen] = _alike(a, b, histograms, n_colour, sure, weights)
                similarity[chosen] = _similarity(alike[chosen], a, b, sizes, boxes, pixels, weights)
                bound[chosen] = 0
            most, mosts_pair = -np.inf, -1
            for pair in range(first[a], stop[a]):
                if similarity[pair] >= most and alive[partner[pair]]:
                    most, mosts_pair = similarity[pair], pair
            best[a], best_pair[a] = most, mosts_pair
            _play(winners, best, best_pair, a)
        if chosen < 0:
            break
        a, b = owner[chosen], partner[chosen]
        size = sizes[a] + sizes[b]
        sizes[new] = size
        for j in range(histograms.shape[1]):
            histograms[new, j] = (histograms[a, j] * sizes[a] + histograms[b, j] * sizes[b]) / size
        for j in range(2):
            boxes[new, j] = min(boxes[a, j], boxes[b, j])
            boxes[new, 2 + j] = max(boxes[a, 2 + j], boxes[b, 2 + j])
        if count + new > capacity:  # a region has fewer than new neighbours
            kept = 0
            for pair in range(count):
                if alive[owner[pair]] and alive[partner[pair]]:
                    owner[kept], partner[kept], bound[kept] = owner[pair], partner[pair], bound[pair]
                    alike[kept], similarity[kept] = alike[pair], similarity[pair]
                    kept += 1
            count = kept
            if 4 * (count + new) > capacity:
                capacity = 8 * (count + new)
                owner, partner = _longer(owner, count, capacity), _longer(partner, count, capacity)
                alike, similarity = _longer(alike, count, capacity), _longer(similarity, count, capacity)
                bound, following = _longer(bound, count, capacity), np.empty(capacity, np.int32)
            _index(owner, partner, similarity, following, count, first, stop, head, tail, best, best_pair)
            for i in range(total):
                pair_with[i] = -1
            for i in range(total - 1, 0, -1):
                winners[i] = _better(winners[2 * i], winners[2 * i + 1], best, best_pair)
        alive[a] = alive[b] = 0
        best[a] = best[b] = -np.inf
        best_pair[a] = best_pair[b] = -1
        alive[new] = 1
        gain_a = _gain(new, a, histograms, n_colour, weights)
        gain_b = _gain(new, b, histograms, n_colour, weights)
        first[new] = count
        own_a, own_b, in_a, in_b = first[a], first[b], head[a], head[b]
        while True:  # the pairs of a and b, oldest first: from whichever list has the oldest, up to the others' oldest
            next_1 = own_a if own_a < stop[a] else none
            next_2 = own_b if own_b < stop[b] else none
            next_3 = in_a if in_a >= 0 else none
            next_4 = in_b if in_b >= 0 else none
            pair = min(min(next_1, next_2), min(next_3, next_4))
            if pair == none:
                break
            if pair in (next_1, next_2):
                of_a = pair == next_1
                limit = min(next_2 if of_a else next_1, min(next_3, next_4))
                limit = min(limit + 1, stop[a] if of_a else stop[b])  # + 1: the pair of a and b is in two lists
                gain = gain_a if of_a else gain_b
                while pair < limit:
                    other = partner[pair]
                    if alive[other]:
                        count = _renew(
                            pair, other, gain, new, count, first[new], owner, partner, alike, bound,
                            pair_with, following, head, tail,
                        )  # fmt: skip
                    pair += np.int32(1)
                if of_a:
                    own_a = pair
                else:
                    own_b = pair
            else:
                of_a = pair == next_3
                limit = min(next_4 if of_a else next_3, min(next_1, next_2))
                gain = gain_a if of_a else gain_b
                while 0 <= pair <= limit:
                    other = owner[pair]
                    if alive[other]:
                        count = _renew(
                            pair, other, gain, new, count, first[new], owner, partner, alike, bound,
                            pair_with, following, head, tail,
                        )  # fmt: skip
                    pair = following[pair]
                if of_a:
                    in_a = pair
                else:
                    in_b = pair
        stop[new] = count
        most, mosts_pair = -np.inf, -1
        left, top, right, bottom = boxes[new, 0], boxes[new, 1], boxes[new, 2], boxes[new, 3]
        for pair in range(first[new], count):
            other = partner[pair]
            wide = max(right, boxes[other, 2]) - min(left, boxes[other, 0])
            high = max(bottom, boxes[other, 3]) - min(top, boxes[other, 1])
            both = (size + sizes[other]) * a_pixel
            around = wide * high * a_pixel
            similar = alike[pair] + weights[2] * (1.0 - both) + weights[3] * (1.0 - around + both) + SLACK
            similarity[pair] = similar
            if similar >= most:
                most, mosts_pair = similar, pair
        best[new], best_pair[new] = most, mosts_pair
        for region in (a, b, np.int32(new)):
            _play(winners, best, best_pair, region)
        new += 1
    return new


@inlined
def _better(a, b, best, best_pair):
    return a if best[a] > best[b] or (best[a] == best[b] and best_pair[a] >= best_pair[b]) else b


@inner
def _play(winners, best, best_pair, region):
    """Bring the tournament up to date after a change of ``region``."""
    i = (len(winners) // 2 + region) // 2
    while i:
        winners[i] = _better(winners[2 * i], winners[2 * i + 1], best, best_pair)
        i //= 2


@inlined
def _renew(pair, other, gain, new, count, begin, owner, partner, alike, bound, pair_with, following, head, tail):
    """Make ``pair``, of a region that was merged into ``new``, one of ``new`` and ``other``."""
    at = pair_with[other]
    if at >= begin:  # the other of the two was its neighbour, too
        alike[at] = min(alike[at], alike[pair] + gain)
        return count
    pair_with[other] = count
    owner[count], partner[count], alike[count], bound[count] = new, other, alike[pair] + gain, 1
    _append(count, other, following, head, tail)
    return count + 1


@inner
def _longer(array, n, length):
    longer = np.empty(length, array.dtype)
    for i in range(n):
        longer[i] = array[i]
    return longer


@inlined
def _append(pair, region, following, head, tail):
    following[pair] = -1
    if head[region] < 0:
        head[region] = pair
    else:
        following[tail[region]] = pair
    tail[region] = pair


@inner
def _index(owner, partner, similarity, following, count, first, stop, head, tail, best, best_pair):
    """Everything :func:`group` keeps besides the pairs themselves, which lie together by owner."""
    for i in range(len(first)):
        first[i] = stop[i] = 0
        head[i] = best_pair[i] = -1
        best[i] = -np.inf
    for pair in range(count):
        region = owner[pair]
        if pair == 0 or owner[pair - 1] != region:
            first[region] = pair
        stop[region] = pair + 1
        if similarity[pair] >= best[region]:
            best[region], best_pair[region] = similarity[pair], pair
        _append(pair, partner[pair], following, head, tail)
