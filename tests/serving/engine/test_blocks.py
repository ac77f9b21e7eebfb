import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.serving.engine.blocks import BlockPool, chain_hash, chain_root
from lightning_llm.serving.kernels.batch import NULL_BLOCK


def test_blocks_are_taken_and_given_back():
    pool = BlockPool(5)
    assert (pool.total, pool.num_free) == (4, 4)
    blocks = pool.allocate(3)
    assert NULL_BLOCK not in blocks and len(set(blocks)) == 3
    pool.check([blocks])
    with pytest.raises(RuntimeError, match="2 blocks wanted, 1 of 4 free"):
        pool.allocate(2)
    pool.release(blocks)
    assert pool.num_free == 4
    with pytest.raises(RuntimeError, match="released once too often"):
        pool.release(blocks)


def test_a_released_block_is_found_until_it_is_needed():
    pool = BlockPool(4)
    root = chain_root("tenant")
    contents = [chain_hash(root, [index]) for index in range(3)]
    blocks = pool.allocate(3)
    for block, content in zip(blocks, contents, strict=True):
        pool.register(block, content)
    pool.release(blocks)
    assert [pool.find(content) for content in contents] == blocks
    pool.allocate(1)  # the last block of a sequence goes first: fewer prompts have it in common
    assert [pool.find(content) for content in contents] == [*blocks[:2], None]
    pool.share(blocks[0])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.num_free == 0


def test_blocks_without_content_are_reused_before_those_that_can_be_found():
    pool = BlockPool(4)
    known, other = pool.allocate(1), pool.allocate(1)
    pool.register(known[0], b"x" * 16)
    pool.release(known)
    pool.release(other)
    assert pool.allocate(2)[0] == other[0] and pool.find(b"x" * 16) == known[0]


def test_of_two_equal_blocks_the_first_is_found():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find(b"same") == first
    pool.release([second])
    assert pool.find(b"same") == first
    pool.check([[first]])


def test_the_check_notices_wrong_books():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(RuntimeError, match="counted 1 times, held 0"):
        pool.check([])
    with pytest.raises(RuntimeError, match="counted 1 times, held 2"):
        pool.check([blocks, blocks[:1]])


def test_states_tell_free_cached_held_and_shared():
    pool = BlockPool(6)
    held, shared, cached = pool.allocate(3)
    pool.share(shared)
    pool.register(cached, b"c")
    pool.release([cached])
    states = pool.states()
    assert [states[block - 1] for block in (held, shared, cached)] == [2, 3, 1]
    assert states.count(0) == 2


@given(st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=8), min_size=1, max_size=4), st.text(max_size=4))
def test_a_hash_depends_on_everything_before(blocks, salt):
    def chain(root, blocks):
        for block in blocks:
            root = chain_hash(root, block)
        return root

    plain = chain(chain_root(salt), blocks)
    assert plain == chain(chain_root(salt), blocks)
    assert plain != chain(chain_root(salt + "x"), blocks)
    changed = [[blocks[0][0] + 1, *blocks[0][1:]], *blocks[1:]]
    assert plain != chain(chain_root(salt), changed)
    assert chain_root("\ud800") != chain_root("\udfff")
