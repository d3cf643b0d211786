"""What the example's students typed into their solution cells. It knows the questions, not the students.

Keys are the notebook (`assignment/notebook`) and the `grade_id` of the cell that the text replaces.
"""

Answers = dict[str, dict[str, str]]

RIGHT: Answers = {
    "ps1/functions": {
        "mean": '''\
def mean(values):
    """Return the arithmetic mean of a non-empty list of numbers."""
    if len(values) == 0:
        raise ValueError("no numbers, no mean")
    total = 0
    for value in values:
        total += value
    return total / len(values)
''',
        "collatz": '''\
def collatz(n):
    """Return the Collatz sequence from n down to 1 as a list of integers."""
    result = [n]
    while result[-1] > 1:
        last = result[-1]
        result.append(last // 2 if last % 2 == 0 else 3 * last + 1)
    return result
''',
        "longest_start": '''\
def longest_start(limit):
    """Return the start below limit with the longest Collatz sequence; the smaller one if two tie."""
    best, length = 1, 1
    for start in range(2, limit):
        if len(collatz(start)) > length:
            best, length = start, len(collatz(start))
    return best
''',
        "own_function": '''\
def odd_share(start):
    """Return which share of the sequence from start is odd."""
    sequence = collatz(start)
    return sum(number % 2 for number in sequence) / len(sequence)


print(f"{odd_share(27):.0%} of the numbers after 27 are odd")
''',
        "why_while": "Because nobody knows beforehand after how many steps the sequence reaches 1.",
    },
    "ps1/text": {
        "words": '''\
def words(line):
    """Return the words of a line: lower case, without punctuation around them."""
    found = []
    for piece in line.lower().split():
        piece = piece.strip(".,;:!?")
        if piece:
            found.append(piece)
    return found
''',
        "count_words": '''\
from collections import Counter

def count_words(lines):
    """Return a dictionary {word: how often it occurs in the lines}."""
    return dict(Counter(word for line in lines for word in words(line)))
''',
        "favourites": '''\
def favourites(counts, n):
    """Return the n most frequent words; ties are in alphabetical order."""
    return [word for _, word in sorted((-count, word) for word, count in counts.items())][:n]
''',
        "why_lower": "*Ice* at the start of a line and *ice* in the middle would be two different keys.",
    },
    "ps2/weather": {
        "load": '''\
def load(path):
    """Return the weather data as a DataFrame, sorted by station and date."""
    table = pd.read_csv(path)
    table["date"] = pd.to_datetime(table["date"])
    return table.sort_values(by=["station", "date"], ignore_index=True)
''',
        "monthly_means": '''\
def monthly_means(table):
    """Return the mean temperature: a row for each month, a column for each station."""
    by = [table["date"].dt.month, "station"]
    return table.groupby(by)["temperature"].mean().unstack("station")
''',
        "moving_average": '''\
def moving_average(x, width):
    """Return the means of all windows of the given width over x."""
    return np.convolve(x, np.full(width, 1 / width), mode="valid")
''',
        "plot_temperatures": '''\
def plot_temperatures(table):
    """Draw one line per station and return the axes."""
    wide = table.pivot(index="date", columns="station", values="temperature")
    axes = wide.plot(figsize=(8, 4), xlabel="day", ylabel="mean temperature / °C")
    axes.legend(title="station")
    return axes
''',
        "describe": "In Hanko spring has begun by the middle of March; Utsjoki catches up until May.",
    },
}

ALSO_RIGHT: Answers = {
    "ps1/functions": {
        "mean": """\
from statistics import fmean

def mean(values):
    if not values:
        raise ValueError("the list is empty")
    return fmean(values)
""",
        "collatz": """\
def collatz(n):
    if n == 1:
        return [1]
    return [n] + collatz(3 * n + 1 if n % 2 else n // 2)
""",
        "longest_start": """\
from functools import lru_cache

@lru_cache(maxsize=None)
def steps(n):
    return 1 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

def longest_start(limit):
    return max(range(1, limit), key=steps)
""",
        "own_function": """\
high = [n for n in range(1, 20) if max(collatz(n)) > 100]
print("Starts below 20 that climb over 100:", high)
""",
        "why_while": "A for loop needs to know how often; here one only knows when to stop.",
    },
    "ps1/text": {
        "words": """\
import re

def words(line):
    return [w for w in (re.sub(r"^[.,;:!?]+|[.,;:!?]+$", "", p) for p in line.lower().split()) if w]
""",
        "count_words": """\
def count_words(lines):
    everything = words(" ".join(lines))
    return {word: everything.count(word) for word in set(everything)}
""",
        "favourites": """\
def favourites(counts, n):
    return sorted(sorted(counts), key=counts.get, reverse=True)[:n]
""",
        "why_lower": "Ice would not be ice. It stands at the start of line 1 and after the comma in line 4.",
    },
    "ps2/weather": {
        "load": """\
def load(path):
    return pd.read_csv(path, parse_dates=["date"]).sort_values(["station", "date"], ignore_index=True)
""",
        "monthly_means": """\
def monthly_means(table):
    by_month = table.groupby(table["date"].dt.month)
    return pd.DataFrame({m: part.groupby("station")["temperature"].mean() for m, part in by_month}).T
""",
        "moving_average": """\
def moving_average(x, width):
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x, dtype=float), width)
    return windows.mean(axis=1)
""",
        "plot_temperatures": """\
def plot_temperatures(table):
    fig, ax = plt.subplots()
    for name in sorted(table.station.unique()):
        one = table[table.station == name]
        ax.plot(one.date, one.temperature, ".-", label=name, markersize=3)
    ax.set(xlabel="2024", ylabel="T in °C")
    ax.legend()
    return ax
""",
        "describe": "The sea keeps Hanko mild, Utsjoki is cold until April.",
    },
}

HALF: Answers = {
    "ps1/functions": {
        "mean": "def mean(values):\n    return sum(values) / len(values)\n",
        "collatz": RIGHT["ps1/functions"]["collatz"],
        "longest_start": "def longest_start(limit):\n    return 9\n",
    },
    "ps1/text": {
        "words": 'def words(line):\n    return line.lower().replace(",", "").replace("!", "").split()\n',
        "count_words": "def count_words(lines):\n    return {}\n",
        "favourites": RIGHT["ps1/text"]["favourites"],
        "why_lower": "Because of Ice and ice.",
    },
    "ps2/weather": {
        "load": RIGHT["ps2/weather"]["load"],
        "monthly_means": """\
def monthly_means(table):
    table = table.fillna(0)
    return table.groupby([table["date"].dt.month, "station"])["temperature"].mean().unstack()
""",
        "moving_average": """\
def moving_average(x, width):
    return np.convolve(x, np.ones(width)) / width
""",
        "plot_temperatures": RIGHT["ps2/weather"]["plot_temperatures"],
    },
}
