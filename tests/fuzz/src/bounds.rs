//! What reading an input may cost: a second of the processor, and memory of 4 times its bytes and
//! 64 MiB. The processor's time, because the clock on the wall runs on while others compute.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

pub const TIME: Duration = Duration::from_secs(1);
const FACTOR: usize = 4;
const CONSTANT: usize = 64 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which knows how many bytes live and how many did at most.
pub struct Counting;

// SAFETY: every call is the system allocator's; the counters touch no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promises are those of `System.alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    /// Both blocks live for a moment, as they do when the system moves the bytes.
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grow(size);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(block, layout, size) };
        LIVE.fetch_sub(if moved.is_null() { size } else { layout.size() }, Relaxed);
        moved
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) };
        LIVE.fetch_sub(layout.size(), Relaxed);
    }
}

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

/// Runs what reads an input of so many bytes; panics if that took more time or memory than it may.
pub fn bounded<T>(input: usize, read: impl FnOnce() -> T) -> T {
    let start = processor_time();
    let result = within_memory(input, read);
    let took = processor_time() - start;
    assert!(took <= TIME, "{took:?} of the processor for an input of {input} bytes, {TIME:?} may");
    result
}

/// The same with all the time that it takes.
pub fn within_memory<T>(input: usize, read: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = read();
    let grown = PEAK.load(Relaxed).saturating_sub(before);
    let limit = FACTOR * input + CONSTANT;
    assert!(grown <= limit, "{grown} bytes live at once for an input of {input}, {limit} may");
    result
}

/// What this thread has had of the processor.
pub fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, which is ours.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "the system does not count the processor's time");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
