"""Layers laid over each other."""

from __future__ import annotations

import time

import pytest

from vmette.images.archive import MAX_TEXT, ArchiveError, Entry
from vmette.images.tree import MAX_LINKS, Node, Tree


def f(path: str, mode: int = 0o644) -> Entry:
    return Entry(path.encode(), "f", mode)


def d(path: str, mode: int = 0o755) -> Entry:
    return Entry(path.encode(), "d", mode)


def link(path: str, target: str) -> Entry:
    return Entry(path.encode(), "l", 0o777, target=target.encode())


def hard(path: str, target: str) -> Entry:
    return Entry(path.encode(), "h", target=target.encode())


def gone(path: str) -> Entry:
    return Entry(path.encode(), "w")


def opaque(path: str) -> Entry:
    return Entry(path.encode(), "o")


def tree_of(*layers: list[Entry], max_nodes: int = 1000) -> Tree:
    tree = Tree(max_nodes)
    for number, entries in enumerate(layers):
        tree.apply(entries, number)
    return tree


def shown(*layers: list[Entry]) -> str:
    """Paths, directories with a slash, links with their targets."""
    out = []
    for path, node in tree_of(*layers).walk():
        mark = {"d": "/", "l": ">" + node.target.decode()}.get(node.kind, "")
        out.append(path.decode() + mark)
    return " ".join(out[1:])


def refused(*layers: list[Entry], max_nodes: int = 1000) -> str:
    with pytest.raises(ArchiveError) as caught:
        tree_of(*layers, max_nodes=max_nodes)
    return str(caught.value)


def at(tree: Tree, path: str) -> Node:
    node = tree.find(path.encode())
    assert node is not None
    return node


LOWER = [d("a"), f("a/x"), f("a/y"), d("a/sub"), f("a/sub/z"), f("b")]


def test_upper_layers_add_and_replace() -> None:
    assert shown(LOWER, [f("c"), f("a/x", 0o600)]) == "a/ a/sub/ a/sub/z a/x a/y b c"
    tree = tree_of(LOWER, [f("a/x", 0o600)])
    assert (at(tree, "a/x").mode, at(tree, "a/x").layer) == (0o600, 1)
    assert (at(tree, "a/y").mode, at(tree, "a/y").layer) == (0o644, 0)


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ([gone("a/x")], "a/ a/sub/ a/sub/z a/y b"),
        ([gone("a")], "b"),
        ([gone("b"), gone("nothing"), gone("b/x"), gone("no/thing"), gone("a/x/y")], "a/ a/sub/ a/sub/z a/x a/y"),
        ([opaque("a")], "a/ b"),
        ([opaque("a"), f("a/new")], "a/ a/new b"),
        ([f("a/new"), opaque("a")], "a/ a/new b"),
        ([opaque("")], ""),
        ([f("new"), opaque("")], "new"),
        ([opaque("b"), opaque("nothing"), opaque("a/x")], "a/ a/sub/ a/sub/z a/x a/y b"),
        ([gone("a/x"), f("a/x")], "a/ a/sub/ a/sub/z a/x a/y b"),
        ([f("a/x"), gone("a/x")], "a/ a/sub/ a/sub/z a/x a/y b"),
        ([d("a"), f("a/n"), gone("a")], "a/ a/n b"),
        ([gone("a"), d("a"), f("a/n")], "a/ a/n b"),
        ([gone("a"), f("a")], "a b"),
    ],
)
def test_whiteouts_are_for_lower_layers_wherever_they_come(upper: list[Entry], expected: str) -> None:
    assert shown(LOWER, upper) == expected


def test_a_whiteout_of_what_is_in_no_lower_layer_hides_nothing_above() -> None:
    assert shown([gone("a"), f("a")], [f("b")], [gone("b")]) == "a"


def test_a_directory_over_a_directory_keeps_what_is_in_it_and_changes_its_own() -> None:
    tree = tree_of(LOWER, [Entry(b"a", "d", 0o700, 5, 6, 7, xattrs={b"user.a": b"b"})])
    node = at(tree, "a")
    assert (node.mode, node.uid, node.gid, node.mtime, node.xattrs) == (0o700, 5, 6, 7, {b"user.a": b"b"})
    assert set(node.children or {}) == {b"x", b"y", b"sub"}
    assert at(tree_of(LOWER, [f("a/n")]), "a").mode == 0o755


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ([f("a")], "a b"),
        ([link("a", "b")], "a>b b"),
        ([d("b"), f("b/x")], "a/ a/sub/ a/sub/z a/x a/y b/ b/x"),
        ([f("a"), d("a"), f("a/n")], "a/ a/n b"),
        ([hard("a", "b")], "a b"),
    ],
)
def test_other_kinds_replace_each_other_whole(upper: list[Entry], expected: str) -> None:
    assert shown(LOWER, upper) == expected


def test_the_root() -> None:
    tree = tree_of([Entry(b"", "d", 0o711, 1, 2, 3)], [f("x")])
    assert (tree.root.mode, tree.root.uid, tree.root.gid, tree.root.mtime) == (0o711, 1, 2, 3)
    assert tree.find(b"") is tree.root


# --- symlinks on the way


@pytest.mark.parametrize(
    "target",
    [
        "usr/lib",
        "/usr/lib",
        "./usr//lib/",
        "../usr/lib",
        "../../../../usr/lib",
        "/../usr/lib",
        "usr/../usr/lib",
        "indirect",
    ],
)
def test_symlinks_on_the_way_are_followed_within_the_root(target: str) -> None:
    lower = [d("usr"), d("usr/lib"), link("indirect", "/usr/lib"), link("lib", target)]
    tree = tree_of(lower, [f("lib/x")])
    assert at(tree, "usr/lib/x").layer == 1
    assert at(tree, "lib").kind == "l"
    assert tree.find(b"lib/x") is at(tree, "usr/lib/x")
    assert tree_of(lower, [f("lib/x")], [gone("lib/x")]).find(b"usr/lib/x") is None
    assert shown(lower, [f("lib/x"), f("usr/lib/y")], [opaque("lib")]).endswith("usr/ usr/lib/")


def test_dot_dot_is_the_directory_above_what_the_symlink_led_to() -> None:
    lower = [d("a"), d("a/b"), d("a/b/c"), link("l", "a/b/c"), link("a/up", "../x")]
    assert at(tree_of(lower, [link("m", "l/../y"), d("a/b/y"), f("m/f")]), "a/b/y/f").kind == "f"
    assert at(tree_of(lower, [d("x"), f("a/up/f")]), "x/f").kind == "f"


def test_a_symlink_to_nowhere_gets_its_directory() -> None:
    assert shown([link("l", "to/where")], [f("l/x")]) == "l>to/where to/ to/where/ to/where/x"


def test_a_symlink_to_a_directory_is_replaced_by_a_directory() -> None:
    lower = [d("usr"), f("usr/old"), link("lib", "usr")]
    assert shown(lower, [d("lib"), f("lib/x")]) == "lib/ lib/x usr/ usr/old"


@pytest.mark.parametrize("order", [1, -1])
def test_whiteouts_below_a_new_directory_do_not_follow_the_symlink_that_it_replaces(order: int) -> None:
    lower = [d("usr"), f("usr/x"), f("usr/y"), link("lib", "usr"), link("two", "usr")]
    assert shown(lower, [d("lib"), gone("lib/x")][::order]) == "lib/ two>usr usr/ usr/x usr/y"
    assert shown(lower, [d("lib"), opaque("lib")][::order]) == "lib/ two>usr usr/ usr/x usr/y"
    assert shown(lower, [d("lib"), gone("two/x")][::order]) == "lib/ two>usr usr/ usr/y"


@pytest.mark.parametrize("target", ["l", "./l", "/l", "l/x", "m"])
def test_loops(target: str) -> None:
    lower = [link("l", target), link("m", "l")]
    assert "too many symlinks" in refused(lower, [f("l/x")])
    assert shown(lower, [gone("l/x"), opaque("l"), gone("m")]) == f"l>{target}"


def test_as_many_symlinks_as_linux_takes() -> None:
    chain = [d("d"), link("l0", "d"), *(link(f"l{n}", f"l{n - 1}") for n in range(1, MAX_LINKS + 1))]
    assert at(tree_of(chain, [f(f"l{MAX_LINKS - 1}/x")]), "d/x")
    refused(chain, [f(f"l{MAX_LINKS}/x")])


def test_hostile_symlinks_end_soon() -> None:
    """Each leads twice to the one before: 2 ** 30 steps, were there no limit."""
    lower = [d("x"), link("l0", "x/.."), *(link(f"l{n}", f"l{n - 1}/l{n - 1}") for n in range(1, 31))]
    started = time.process_time()
    refused(lower, [f("l30/f")])
    long = [link("m0", "./" * 2000 + "x"), *(link(f"m{n}", "/" + "./" * 2000 + f"m{n - 1}") for n in range(1, 30))]
    assert "too long" in refused(lower, long, [f("m29/f")])
    assert time.process_time() - started < 1


def test_all_entries_together_have_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million entries in 8000 components each would take half an hour, of an archive of a few megabytes."""
    monkeypatch.setattr("vmette.images.tree.MAX_WALK", 50_000)
    lower = [d("x"), link("l", "x/../" * 400 + "x")]
    assert tree_of(lower, [f(f"l/{n}") for n in range(900)])  # the way is gone once for all that follow one another
    assert tree_of(lower, [f(f"{directory}{n}") for n in range(55) for directory in ("l/a", "x/b")])
    assert "too long" in refused(lower, [f(f"{directory}{n}") for n in range(70) for directory in ("l/a", "x/b")])
    assert "too long" in refused(lower, *([gone("l/x")] for _ in range(70)))


def test_symlinks_do_not_make_paths_that_are_too_long() -> None:
    long = "n" * 250
    deep = "/".join([long] * 16)
    assert len(deep) + 1 + 79 < 4096
    lower = [f(f"{deep}/x"), link("l", deep)]
    assert tree_of(lower, [f("l/" + "f" * 79)])
    assert "longer than 4095" in refused(lower, [f("l/" + "f" * 80)])
    assert "longer than 4095" in refused(lower, [f(f"l/{'d' * 80}/f")])
    assert "longer than 4095" in refused(lower, [link("m", f"l/{'d' * 79}")], [f("m/f")])


@pytest.mark.parametrize("path", ["b/x", "a/x/new", "l/x", "l/y/z"])
def test_a_file_in_the_way(path: str) -> None:
    message = refused([*LOWER, link("l", "b")], [f(path)])
    assert "file on the way" in message
    assert path.rpartition("/")[0] in message


# --- hard links


def test_hard_links_are_one_file_across_layers() -> None:
    tree = tree_of(LOWER, [hard("a/hard", "a/x"), hard("again", "a/hard")], [hard("third", "again")])
    assert at(tree, "a/x") is at(tree, "a/hard") is at(tree, "again") is at(tree, "third")
    tree = tree_of(LOWER, [hard("n", "b")], [f("b", 0o600)])
    assert (at(tree, "n").mode, at(tree, "b").mode) == (0o644, 0o600)
    assert shown(LOWER, [hard("n", "b")], [gone("b"), gone("a")]) == "n"


def test_hard_links_follow_symlinks_on_the_way_only() -> None:
    lower = [*LOWER, link("l", "a"), link("a/to", "x")]
    tree = tree_of(lower, [hard("n", "l/x"), hard("m", "l/to"), hard("l/o", "b")])
    assert at(tree, "n") is at(tree, "a/x")
    assert at(tree, "m") is at(tree, "a/to")
    assert at(tree, "m").kind == "l"
    assert at(tree, "a/o") is at(tree, "b")


@pytest.mark.parametrize("target", ["nothing", "a", "", "b/x", "a/nothing/x", "loop/x", "n"])
def test_hard_links_to_what_is_no_file(target: str) -> None:
    message = refused([*LOWER, link("loop", "loop")], [hard("n", target)])
    assert "hard link" in message


def test_a_hard_link_to_itself() -> None:
    assert shown(LOWER, [hard("b", "b")]) == shown(LOWER)


# --- limits


def test_the_most_nodes() -> None:
    assert tree_of([f(str(n)) for n in range(10)], max_nodes=10)
    assert "more than 10 files" in refused([f(str(n)) for n in range(11)], max_nodes=10)
    assert tree_of([f("a/b/c")], max_nodes=3)
    refused([f("a/b/c")], max_nodes=2)
    refused([f("a/b/c/d/e")], max_nodes=3)
    refused(*([f(f"{layer}")] for layer in range(11)), max_nodes=10)


def test_names_and_attributes_of_all_layers_together_have_a_limit() -> None:
    big = [Entry(b"l%d" % n, "l", target=b"t" * 4000, xattrs={b"user.x": b"x" * 16000}) for n in range(100)]
    tree = Tree(1 << 30)
    with pytest.raises(ArchiveError, match="names and attributes"):
        for number in range(MAX_TEXT // (100 * 20_000) + 1):
            tree.apply(big, number)
    same = Tree(1 << 30)
    with pytest.raises(ArchiveError, match="names and attributes"):
        same.apply([f("a")], 0)
        for number in range(1, 800):  # hard links are no new nodes, but names
            same.apply([hard("n" * 255 + "/" + "n" * 250 + str(n), "a") for n in range(1000)], number)


def test_walk_of_a_deep_and_wide_tree_needs_little_memory() -> None:
    import tracemalloc

    tree = Tree(100_000)
    tree.apply([link("l", "/".join(["d" * 250] * 16)), *(f(f"l/{n}") for n in range(20_000))], 0)
    tracemalloc.start()
    assert sum(1 for _ in tree.walk()) == 20_000 + 16 + 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


def test_walk_gives_names_in_the_order_of_their_bytes() -> None:
    tree = tree_of([f("b"), f("a/z"), f("a-"), f("a"), d("a"), f("a/b/c"), Entry(b"\xff", "f"), f("é")])
    names = [path for path, _ in tree.walk()]
    assert names == [b"", b"a", b"a/b", b"a/b/c", b"a-", b"b", "é".encode(), b"\xff"]
