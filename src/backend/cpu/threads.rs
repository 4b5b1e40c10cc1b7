//! Who runs the tasks of a call. Tasks are handed out one by one: which thread takes which task
//! changes nothing but time.

use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::lanes::fence;

/// Multiply-adds below which waking a pool or starting threads costs more than it saves.
const POOL_WORTH: usize = 1 << 21;
const SPAWN_WORTH: usize = 1 << 24;

pub(super) struct Threads {
    count: usize,
    /// All threads but the caller's own.
    pool: Option<ThreadPool>,
    /// The process that started the pool: its threads do not survive a fork.
    owner: u32,
}

impl Threads {
    /// Keeps threads for the plan's lifetime.
    pub fn pool(num_threads: usize) -> Threads {
        let count = resolve(num_threads);
        let pool = (count > 1).then(|| {
            let name = |i| format!("blockem-{i}");
            ThreadPoolBuilder::new().num_threads(count - 1).thread_name(name).build().ok()
        });
        let pool = pool.flatten();
        // Where no thread can be had, the caller's does the work.
        let count = if pool.is_some() { count } else { 1 };
        Threads { count, pool, owner: std::process::id() }
    }

    /// Starts threads for one call.
    pub fn scoped(num_threads: usize) -> Threads {
        Threads { count: resolve(num_threads), pool: None, owner: std::process::id() }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Runs `work(worker, task)` for every task; workers are numbered below [`Threads::count`],
    /// and no two tasks run on one worker at a time. `cost` counts multiply-adds.
    pub fn each(&self, tasks: usize, cost: usize, work: impl Fn(usize, usize) + Sync) {
        let next = AtomicUsize::new(0);
        let run = |worker| {
            let _mode = FloatMode::ieee();
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(worker, task);
            }
            fence();
        };
        let run = &run;
        let workers = 1..self.count.min(tasks);
        match &self.pool {
            Some(pool) if cost >= POOL_WORTH && self.owner == std::process::id() => {
                pool.in_place_scope(|scope| {
                    workers.for_each(|worker| scope.spawn(move |_| run(worker)));
                    run(0);
                });
            }
            None if cost >= SPAWN_WORTH && !workers.is_empty() => {
                std::thread::scope(|scope| {
                    for worker in workers {
                        // A thread that does not start leaves its tasks to the others.
                        let thread = std::thread::Builder::new();
                        let _ = thread.spawn_scoped(scope, move || run(worker));
                    }
                    run(0);
                });
            }
            _ => run(0),
        }
    }
}

/// 0 means one thread for each core that is available when this is first asked: a workspace and the
/// call that works in it must agree, and asking costs more than a small call.
fn resolve(num_threads: usize) -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
    match num_threads {
        0 => *CORES.get_or_init(cores),
        n => n,
    }
}

/// Rounding to nearest with denormals for the length of a task: hosts switch them off on some of
/// their threads, and the same bits are promised on all.
struct FloatMode {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    saved: Control,
}

#[cfg(target_arch = "x86_64")]
type Control = u32;
#[cfg(target_arch = "aarch64")]
type Control = u64;

#[cfg(target_arch = "x86_64")]
impl FloatMode {
    /// All exceptions masked, round to nearest, denormals on: the state a process starts in.
    const IEEE: Control = 0x1f80;

    fn ieee() -> FloatMode {
        let mut saved = 0;
        // SAFETY: reads and writes MXCSR only; the value has no reserved bits.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut saved, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &FloatMode::IEEE, options(nostack));
        }
        FloatMode { saved }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for FloatMode {
    fn drop(&mut self) {
        // SAFETY: the value came from MXCSR.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &self.saved, options(nostack)) }
    }
}

#[cfg(target_arch = "aarch64")]
impl FloatMode {
    fn ieee() -> FloatMode {
        let saved;
        // SAFETY: reads and writes FPCR only; zero is its state at start.
        unsafe {
            std::arch::asm!("mrs {}, fpcr", out(reg) saved, options(nostack));
            std::arch::asm!("msr fpcr, {}", in(reg) 0u64, options(nostack));
        }
        FloatMode { saved }
    }
}

#[cfg(target_arch = "aarch64")]
impl Drop for FloatMode {
    fn drop(&mut self) {
        // SAFETY: the value came from FPCR.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.saved, options(nostack)) }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl FloatMode {
    fn ieee() -> FloatMode {
        FloatMode {}
    }
}
