//! Sixteen f32 lanes on every instruction set, with the same bits on each: only operations that
//! IEEE 754 rounds in one way (fma, add, mul, conversions), in an order that the caller fixes.

/// A cache line of packed numbers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [f32; LANES]);

pub(super) const LANES: usize = 16;

/// The instruction sets that the kernels are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    Portable,
    /// The portable code with a software bf16 dot product: what tests run in place of the real one.
    #[cfg(test)]
    PortableBf16,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// The one that kernels use: the machine's newest, unless a test chose another.
    pub fn detect() -> Isa {
        #[cfg(feature = "test-isa")]
        if let Some(isa) = chosen::get() {
            return isa;
        }
        Isa::newest()
    }

    /// The fastest one of this machine.
    fn newest() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 && is_x86_feature_detected!("avx512bf16") {
                return Isa::Avx512Bf16;
            }
            if avx2 && avx512 {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable if cfg!(target_arch = "aarch64") => "neon",
            Isa::Portable => "portable",
            #[cfg(test)]
            Isa::PortableBf16 => "portable-bf16",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => "avx512-bf16",
        }
    }

    /// All that this machine has.
    #[cfg(any(test, feature = "test-isa"))]
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let order = [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];
            let newest = order.iter().position(|isa| *isa == Isa::newest());
            all.extend(newest.map_or(&order[..0], |newest| &order[..=newest]));
        }
        all
    }

    /// Whether bf16 hidden states are multiplied as they are, against rows split into two terms.
    pub fn has_bf16_dot(self) -> bool {
        match self {
            #[cfg(test)]
            Isa::PortableBf16 => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => true,
            _ => false,
        }
    }
}

/// The choice of tests and benchmarks: `blockem_test_use_isa`, or BLOCKEM_TEST_ISA from the start, so
/// that the processes which a test starts compute as it does.
#[cfg(feature = "test-isa")]
pub(super) mod chosen {
    use std::sync::{OnceLock, RwLock};

    use super::Isa;

    fn choice() -> &'static RwLock<Option<Isa>> {
        static CHOICE: OnceLock<RwLock<Option<Isa>>> = OnceLock::new();
        CHOICE.get_or_init(|| {
            let name = std::env::var("BLOCKEM_TEST_ISA").ok();
            RwLock::new(name.map(|name| {
                named(&name).unwrap_or_else(|| panic!("no BLOCKEM_TEST_ISA={name} on this machine"))
            }))
        })
    }

    fn named(name: &str) -> Option<Isa> {
        Isa::available().into_iter().find(|isa| isa.name() == name)
    }

    pub fn get() -> Option<Isa> {
        *choice().read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether the machine has it. Plans keep the one that they were made with.
    pub fn set(name: &str) -> bool {
        let isa = named(name);
        if isa.is_some() {
            *choice().write().unwrap_or_else(|poisoned| poisoned.into_inner()) = isa;
        }
        isa.is_some()
    }
}

/// Runs a [`Work`] on the lanes of the chosen instruction set.
macro_rules! with_lanes {
    ($isa:expr, $lanes:ident => $body:expr) => {
        match $isa {
            Isa::Portable => {
                type $lanes = $crate::backend::cpu::lanes::Portable;
                $body
            }
            #[cfg(test)]
            Isa::PortableBf16 => {
                type $lanes = $crate::backend::cpu::lanes::Portable;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                type $lanes = $crate::backend::cpu::lanes::Avx2;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => {
                type $lanes = $crate::backend::cpu::lanes::Avx512;
                $body
            }
        }
    };
}
pub(super) use with_lanes;

/// A piece of work that is compiled once per instruction set.
///
/// Its code must be inlined throughout: what the compiler leaves as a function of its own has the
/// baseline's instructions, and each intrinsic in it becomes a call. So lanes are handled in
/// `#[inline(always)]` functions and loops, not in closures. bindings/python/tests/test_hot_loops.py reads the machine code.
pub(super) trait Work {
    type Out;

    /// Always inlined into [`Lanes::enter`], where the instructions are switched on.
    ///
    /// # Safety
    /// The machine must have the lanes' instructions and the work's pointers must be valid.
    unsafe fn run(self) -> Self::Out;
}

/// One register of sixteen f32, whatever it is made of.
///
/// # Safety of all methods
/// The machine must have the instructions; a pointer must be good for the elements that its type
/// and the name of the method say; `stream_*` need alignment to the bytes that they write.
pub(super) trait Lanes: Copy {
    type V: Copy;
    /// One of the registers that V is made of, where a tile of dot products takes one after the other.
    type Part: Copy;
    const PARTS: usize;
    /// Tokens and latents of the tile of dot products whose parts fit the register file.
    const TOKENS: usize;
    const LATENTS: usize;
    /// Registers of dH that are summed at once.
    const WIDTH: usize;

    unsafe fn enter<W: Work>(work: W) -> W::Out;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Lane l with lane l + 8, then l + 4, l + 2, l + 1.
    unsafe fn sum(v: Self::V) -> f32;
    /// Bit i is set where element i < n ≤ 16 is not zero; NaN is not zero.
    unsafe fn nonzero(p: *const f32, n: usize) -> u32;

    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    unsafe fn store_f16(p: *mut u16, v: Self::V);
    /// Past the caches.
    unsafe fn stream(p: *mut f32, v: Self::V);
    unsafe fn stream_bf16(p: *mut u16, v: Self::V);
    unsafe fn stream_f16(p: *mut u16, v: Self::V);

    unsafe fn zero_part() -> Self::Part;
    /// Part `i` of the sixteen f32 at `p`.
    unsafe fn load_part(p: *const f32, i: usize) -> Self::Part;
    unsafe fn store_part(p: *mut f32, i: usize, part: Self::Part);
    unsafe fn fma_part(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part;
}

/// Lanes that also multiply pairs of bf16 into f32.
pub(super) trait Bf16Dot: Lanes {
    /// 32 bf16.
    type Pairs: Copy;

    unsafe fn enter_bf16<W: Work>(work: W) -> W::Out;
    unsafe fn load_pairs(p: *const u8) -> Self::Pairs;
    /// c + a[2l+1] · b[2l+1], then + a[2l] · b[2l]: rounded after each, denormals are zero.
    unsafe fn dot(c: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V;
}

/// The type of hidden states or of dH in memory.
pub(super) trait Element: Copy {
    const BYTES: usize;

    unsafe fn load<L: Lanes>(p: *const u8) -> L::V;
    unsafe fn store<L: Lanes>(p: *mut u8, v: L::V);
    unsafe fn stream<L: Lanes>(p: *mut u8, v: L::V);

    /// The first `n` < 16 of a register; zeros follow.
    #[inline(always)]
    unsafe fn load_end<L: Lanes>(p: *const u8, n: usize) -> L::V {
        let mut line = Line([0.0; LANES]);
        let line = (&raw mut line).cast::<u8>();
        // SAFETY: the caller's promise: n elements, which are no wider than the line's.
        unsafe {
            p.copy_to_nonoverlapping(line, n * Self::BYTES);
            Self::load::<L>(line)
        }
    }
}

macro_rules! element {
    ($name:ident, $t:ty, $load:ident, $store:ident, $stream:ident) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name;

        impl Element for $name {
            const BYTES: usize = size_of::<$t>();

            #[inline(always)]
            unsafe fn load<L: Lanes>(p: *const u8) -> L::V {
                // SAFETY: the caller's promise to `Lanes`.
                unsafe { L::$load(p.cast()) }
            }

            #[inline(always)]
            unsafe fn store<L: Lanes>(p: *mut u8, v: L::V) {
                // SAFETY: the caller's promise to `Lanes`.
                unsafe { L::$store(p.cast(), v) }
            }

            #[inline(always)]
            unsafe fn stream<L: Lanes>(p: *mut u8, v: L::V) {
                // SAFETY: the caller's promise to `Lanes`.
                unsafe { L::$stream(p.cast(), v) }
            }
        }
    };
}
element!(F32, f32, load, store, stream);
element!(Bf16, half::bf16, load_bf16, store_bf16, stream_bf16);
element!(F16, half::f16, load_f16, store_f16, stream_f16);

/// Runs an expression with the element type of a dtype; the boundary lets no other through.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            DType::BF16 => {
                type $element = $crate::backend::cpu::lanes::Bf16;
                $body
            }
            DType::F16 => {
                type $element = $crate::backend::cpu::lanes::F16;
                $body
            }
            _ => {
                type $element = $crate::backend::cpu::lanes::F32;
                $body
            }
        }
    };
}
pub(super) use with_element;

/// Asks for a line that will be read soon, into the second-level cache.
#[inline(always)]
pub(super) fn prefetch(line: *const Line) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a hint reads nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.cast())
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Makes streamed stores visible to other threads.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    }
}

/// The methods of one set of lanes; each is inlined where its instructions are on.
macro_rules! methods {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $t:ty),*) $(-> $out:ty)? $body:block)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        // Some bodies of the portable lanes are safe.
        #[allow(unused_unsafe)]
        unsafe fn $name($($arg: $t),*) $(-> $out)? {
            // SAFETY: the caller's promise to `Lanes`.
            unsafe { $body }
        }
    )* };
}

pub(super) use methods;

/// Plain Rust: what the compiler makes of it, e.g. NEON.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Lanes for Portable {
    type V = [f32; LANES];
    type Part = Self::V;
    const PARTS: usize = 1;
    const TOKENS: usize = 3;
    const LATENTS: usize = 2;
    const WIDTH: usize = 4;

    methods! {
        fn zero() -> Self::V { [0.0; LANES] }
        fn splat(x: f32) -> Self::V { [x; LANES] }
        fn add(a: Self::V, b: Self::V) -> Self::V { std::array::from_fn(|i| a[i] + b[i]) }
        fn mul(a: Self::V, b: Self::V) -> Self::V { std::array::from_fn(|i| a[i] * b[i]) }
        fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        }
        fn sum(v: Self::V) -> f32 {
            let a: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
            let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
            (b[0] + b[2]) + (b[1] + b[3])
        }
        fn nonzero(p: *const f32, n: usize) -> u32 {
            (0..n).fold(0, |bits, i| bits | ((*p.add(i) != 0.0) as u32) << i)
        }
        fn load(p: *const f32) -> Self::V { p.cast::<Self::V>().read_unaligned() }
        fn load_bf16(p: *const u16) -> Self::V {
            std::array::from_fn(|i| f32::from_bits((p.add(i).read_unaligned() as u32) << 16))
        }
        fn load_f16(p: *const u16) -> Self::V {
            std::array::from_fn(|i| half::f16::from_bits(p.add(i).read_unaligned()).to_f32())
        }
        fn store(p: *mut f32, v: Self::V) { p.cast::<Self::V>().write_unaligned(v) }
        fn store_bf16(p: *mut u16, v: Self::V) {
            let v = v.map(|x| half::bf16::from_f32(x).to_bits());
            p.cast::<[u16; LANES]>().write_unaligned(v)
        }
        fn store_f16(p: *mut u16, v: Self::V) {
            let v = v.map(|x| half::f16::from_f32(x).to_bits());
            p.cast::<[u16; LANES]>().write_unaligned(v)
        }
        fn stream(p: *mut f32, v: Self::V) { Self::store(p, v) }
        fn stream_bf16(p: *mut u16, v: Self::V) { Self::store_bf16(p, v) }
        fn stream_f16(p: *mut u16, v: Self::V) { Self::store_f16(p, v) }
        fn zero_part() -> Self::V { Self::zero() }
        fn load_part(p: *const f32, _i: usize) -> Self::V { Self::load(p) }
        fn store_part(p: *mut f32, _i: usize, v: Self::V) { Self::store(p, v) }
        fn fma_part(a: Self::V, b: Self::V, c: Self::V) -> Self::V { Self::fma(a, b, c) }
    }

    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the caller's promise.
        unsafe { work.run() }
    }
}

#[cfg(test)]
impl Bf16Dot for Portable {
    type Pairs = [u16; 2 * LANES];

    methods! {
        fn load_pairs(p: *const u8) -> Self::Pairs { p.cast::<Self::Pairs>().read_unaligned() }
        fn dot(c: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V {
            let normal = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
            let wide = |x: u16| normal(f32::from_bits((x as u32) << 16));
            std::array::from_fn(|i| {
                let odd = wide(a[2 * i + 1]).mul_add(wide(b[2 * i + 1]), normal(c[i]));
                normal(wide(a[2 * i]).mul_add(wide(b[2 * i]), normal(odd)))
            })
        }
    }

    unsafe fn enter_bf16<W: Work>(work: W) -> W::Out {
        // SAFETY: the caller's promise.
        unsafe { work.run() }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Bf16Dot, Lanes, Work};

    /// Two 256-bit registers.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    impl Lanes for Avx2 {
        type V = [__m256; 2];
        // Of both registers at once, only 3 × 2 sums would fit, and would read a weight for every three
        // products.
        type Part = __m256;
        const PARTS: usize = 2;
        const TOKENS: usize = 6;
        const LATENTS: usize = 2;
        const WIDTH: usize = 4;

        methods! {
            fn zero() -> Self::V { [_mm256_setzero_ps(); 2] }
            fn splat(x: f32) -> Self::V { [_mm256_set1_ps(x); 2] }
            fn add(a: Self::V, b: Self::V) -> Self::V {
                [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
            }
            fn mul(a: Self::V, b: Self::V) -> Self::V {
                [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
            }
            fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
            }
            fn sum(v: Self::V) -> f32 { sum8(_mm256_add_ps(v[0], v[1])) }
            fn nonzero(p: *const f32, n: usize) -> u32 {
                let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                let mut bits = 0;
                for i in [0, 8] {
                    let left = n.saturating_sub(i).min(8) as i32;
                    let there = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), lane);
                    let x = _mm256_maskload_ps(p.wrapping_add(i), there);
                    let set = _mm256_cmp_ps::<_CMP_NEQ_UQ>(x, _mm256_setzero_ps());
                    bits |= (_mm256_movemask_ps(set) as u32) << i;
                }
                bits
            }
            fn load(p: *const f32) -> Self::V { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
            fn load_bf16(p: *const u16) -> Self::V { [f32_from_bf16(p), f32_from_bf16(p.add(8))] }
            fn load_f16(p: *const u16) -> Self::V { [f32_from_f16(p), f32_from_f16(p.add(8))] }
            fn store(p: *mut f32, v: Self::V) {
                _mm256_storeu_ps(p, v[0]);
                _mm256_storeu_ps(p.add(8), v[1])
            }
            fn store_bf16(p: *mut u16, v: Self::V) {
                _mm256_storeu_si256(p.cast(), bf16_from_f32(v))
            }
            fn store_f16(p: *mut u16, v: Self::V) {
                _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
                _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]))
            }
            fn stream(p: *mut f32, v: Self::V) {
                _mm256_stream_ps(p, v[0]);
                _mm256_stream_ps(p.add(8), v[1])
            }
            fn stream_bf16(p: *mut u16, v: Self::V) {
                _mm256_stream_si256(p.cast(), bf16_from_f32(v))
            }
            fn stream_f16(p: *mut u16, v: Self::V) {
                _mm_stream_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
                _mm_stream_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]))
            }
            fn zero_part() -> __m256 { _mm256_setzero_ps() }
            fn load_part(p: *const f32, i: usize) -> __m256 { _mm256_loadu_ps(p.add(8 * i)) }
            fn store_part(p: *mut f32, i: usize, part: __m256) {
                _mm256_storeu_ps(p.add(8 * i), part)
            }
            fn fma_part(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        }

        unsafe fn enter<W: Work>(work: W) -> W::Out {
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn root<W: Work>(work: W) -> W::Out {
                // SAFETY: the caller's promise.
                unsafe { work.run() }
            }
            // SAFETY: the caller's promise.
            unsafe { root(work) }
        }
    }

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    impl Lanes for Avx512 {
        type V = __m512;
        type Part = __m512;
        const PARTS: usize = 1;
        const TOKENS: usize = 6;
        const LATENTS: usize = 4;
        const WIDTH: usize = 16;

        methods! {
            fn zero() -> __m512 { _mm512_setzero_ps() }
            fn splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
            fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
            fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
            fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
            fn sum(v: __m512) -> f32 {
                sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)))
            }
            fn nonzero(p: *const f32, n: usize) -> u32 {
                let x = _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p);
                _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, _mm512_setzero_ps()) as u32
            }
            fn load(p: *const f32) -> __m512 { _mm512_loadu_ps(p) }
            fn load_bf16(p: *const u16) -> __m512 {
                let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
            }
            fn load_f16(p: *const u16) -> __m512 {
                _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
            }
            fn store(p: *mut f32, v: __m512) { _mm512_storeu_ps(p, v) }
            fn store_bf16(p: *mut u16, v: __m512) {
                _mm256_storeu_si256(p.cast(), bf16_from_f32x16(v))
            }
            fn store_f16(p: *mut u16, v: __m512) {
                _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
            }
            fn stream(p: *mut f32, v: __m512) { _mm512_stream_ps(p, v) }
            fn stream_bf16(p: *mut u16, v: __m512) {
                _mm256_stream_si256(p.cast(), bf16_from_f32x16(v))
            }
            fn stream_f16(p: *mut u16, v: __m512) {
                _mm256_stream_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
            }
            fn zero_part() -> __m512 { Self::zero() }
            fn load_part(p: *const f32, _i: usize) -> __m512 { Self::load(p) }
            fn store_part(p: *mut f32, _i: usize, v: __m512) { Self::store(p, v) }
            fn fma_part(a: __m512, b: __m512, c: __m512) -> __m512 { Self::fma(a, b, c) }
        }

        unsafe fn enter<W: Work>(work: W) -> W::Out {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn root<W: Work>(work: W) -> W::Out {
                // SAFETY: the caller's promise.
                unsafe { work.run() }
            }
            // SAFETY: the caller's promise.
            unsafe { root(work) }
        }
    }

    impl Bf16Dot for Avx512 {
        type Pairs = __m512bh;

        methods! {
            fn load_pairs(p: *const u8) -> __m512bh { p.cast::<__m512bh>().read_unaligned() }
            fn dot(c: __m512, a: __m512bh, b: __m512bh) -> __m512 { _mm512_dpbf16_ps(c, a, b) }
        }

        unsafe fn enter_bf16<W: Work>(work: W) -> W::Out {
            #[target_feature(
                enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
            )]
            unsafe fn root<W: Work>(work: W) -> W::Out {
                // SAFETY: the caller's promise.
                unsafe { work.run() }
            }
            // SAFETY: the caller's promise.
            unsafe { root(work) }
        }
    }

    methods! {
        fn sum8(v: __m256) -> f32 {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
        /// To nearest even; a NaN keeps its sign and upper bits and becomes quiet.
        fn bf16_from_f32x16(v: __m512) -> __m256i {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x40_0000));
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(up))
        }
        /// The same on two registers.
        fn bf16_from_f32(v: [__m256; 2]) -> __m256i {
            let (low, high) = (bf16_from_f32x8(v[0]), bf16_from_f32x8(v[1]));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
        }
        /// In the low halves of eight words.
        fn bf16_from_f32x8(v: __m256) -> __m256i {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan))
        }
        fn f32_from_bf16(p: *const u16) -> __m256 {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
        fn f32_from_f16(p: *const u16) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}
