//! No memory is taken for a token: a test of its own, because it replaces the allocator.
//!
//! Counted is what the calling thread allocates: it takes the same tasks as the others, which may still be starting.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use kernels::inference::{Adapter, CacheType, Decoder, DecoderBlock, Layer, LayerFactors, Session, Shape};
use kernels::quantized::{Layout as Kept, Matrix};
use kernels::{Engine, Path};

struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_token_allocates_nothing() {
    // Miri takes half an hour for what takes a hundredth of a second.
    let (width, ffn, heads, kv_heads, head_size, vocabulary) =
        if cfg!(miri) { (32, 32, 2, 1, 16, 20) } else { (64, 96, 4, 2, 16, 100) };
    let depth = if cfg!(miri) { 1 } else { 3 };
    let shape = Shape {
        width,
        ffn,
        heads,
        kv_heads,
        head_size,
        vocabulary,
        epsilon: 1e-5,
        frequencies: vec![0.1; head_size / 2],
    };
    let matrix = |rows, columns| Matrix::new(rows, columns, Kept::Four);
    let block = |_| DecoderBlock {
        attention_norm: vec![1.0; width],
        qkv: [heads, kv_heads, kv_heads].map(|heads| matrix(heads * head_size, width)),
        biases: None,
        head_norms: None,
        mix: matrix(width, heads * head_size),
        ffn_norm: vec![1.0; width],
        gate: matrix(ffn, width),
        up: matrix(ffn, width),
        down: matrix(width, ffn),
    };
    let blocks = (0..depth).map(block).collect();
    let decoder = Arc::new(Decoder::new(shape, matrix(vocabulary, width), blocks, vec![1.0; width], None));
    let factors = vec![0.1; 2 * width];
    let layer = |block| LayerFactors { block, layer: Layer::Mix, a: &factors, b: &factors };
    let layers: Vec<_> = (0..depth).map(layer).collect();
    let adapter = Arc::new(Adapter::new(decoder.shape(), depth, 2, 1.0, &layers));
    for path in Path::available() {
        let cases = [(2, Some(&adapter), CacheType::F16), (1, None, CacheType::F16), (2, None, CacheType::Q8_0)];
        for (threads, adapter, cache) in cases.into_iter().take(if cfg!(miri) { 1 } else { 3 }) {
            let engine = Engine::new(path, threads, false);
            let mut session = Session::new(&engine, &decoder, 300, cache);
            session.adapt(adapter.cloned());
            // The first prompt makes room for batches, and the threads begin.
            session.next(&[1; 3]);
            session.next(&[2]);
            let before = COUNT.get();
            for token in 0..if cfg!(miri) { 1 } else { 100 } {
                session.next(&[token % 20]);
            }
            session.next(&[3; 3]);
            assert_eq!(COUNT.get() - before, 0, "on {path:?}, {threads} threads, {cache:?}");
        }
    }
}
