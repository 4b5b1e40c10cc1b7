//! The kernels and how one is launched.

use std::ffi::CStr;

use super::params::Params;
use super::{
    ENCODE_TILES, EncodeTile, GLU_SHARED, REDUCE_SHARED, TOPK_SHARED, gradient_shared, sm90,
};

macro_rules! kernels {
    ($($family:ident { $($variant:ident $name:literal,)* })*) => {
        /// A `__global__` function of kernels/.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(in crate::backend::cuda) enum Kernel {
            $($($variant,)*)*
        }

        impl Kernel {
            /// In the order of their numbers: `ALL[kernel as usize] == kernel`.
            pub const ALL: &[Kernel] = &[$($(Kernel::$variant),*),*];

            /// The symbol in the module.
            pub fn name(self) -> &'static CStr {
                match self {
                    $($(Kernel::$variant => $name,)*)*
                }
            }

            fn family(self) -> Family {
                match self {
                    $($(Kernel::$variant => Family::$family,)*)*
                }
            }
        }
    };
}

/// The devices that have a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Any,
    Portable,
    Sm90,
}

kernels! {
    Any {
        Pack c"blockem_pack",
        ReduceLatents c"blockem_reduce_latents",
        ReduceTotal c"blockem_reduce_total",
        Norm c"blockem_norm",
        Pull c"blockem_pull",
        TopK c"blockem_topk",
        GluLatents c"blockem_glu_latents",
        GluCoefficients c"blockem_glu_coefficients",
        Stats c"blockem_stats",
        Steer c"blockem_steer",
        TokenNorms c"blockem_token_norms",
    }
    Portable {
        EncodeF32K8 c"blockem_encode_f32_8",
        EncodeF32K16 c"blockem_encode_f32_16",
        EncodeF32K24 c"blockem_encode_f32_24",
        EncodeF32K32 c"blockem_encode_f32_32",
        EncodeF32Wide c"blockem_encode_f32_wide",
        EncodeF16K8 c"blockem_encode_f16_8",
        EncodeF16K16 c"blockem_encode_f16_16",
        EncodeF16K24 c"blockem_encode_f16_24",
        EncodeF16K32 c"blockem_encode_f16_32",
        EncodeF16K8Tall c"blockem_encode_f16_8_tall",
        EncodeF16K16Tall c"blockem_encode_f16_16_tall",
        EncodeF16K24Tall c"blockem_encode_f16_24_tall",
        EncodeF16K32Tall c"blockem_encode_f16_32_tall",
        EncodeF16Wide c"blockem_encode_f16_wide",
        EncodeBf16K8 c"blockem_encode_bf16_8",
        EncodeBf16K16 c"blockem_encode_bf16_16",
        EncodeBf16K24 c"blockem_encode_bf16_24",
        EncodeBf16K32 c"blockem_encode_bf16_32",
        EncodeBf16K8Tall c"blockem_encode_bf16_8_tall",
        EncodeBf16K16Tall c"blockem_encode_bf16_16_tall",
        EncodeBf16K24Tall c"blockem_encode_bf16_24_tall",
        EncodeBf16K32Tall c"blockem_encode_bf16_32_tall",
        EncodeBf16Wide c"blockem_encode_bf16_wide",
        GradientF32Few c"blockem_gradient_f32_few",
        GradientF32Wide c"blockem_gradient_f32_wide",
        GradientF16Few c"blockem_gradient_f16_few",
        GradientF16Wide c"blockem_gradient_f16_wide",
        GradientBf16Few c"blockem_gradient_bf16_few",
        GradientBf16Wide c"blockem_gradient_bf16_wide",
    }
    Sm90 {
        ResidentF32K8 c"blockem_resident_f32_8",
        ResidentF32K16 c"blockem_resident_f32_16",
        ResidentF32K24 c"blockem_resident_f32_24",
        ResidentF32K32 c"blockem_resident_f32_32",
        ResidentF16K8 c"blockem_resident_f16_8",
        ResidentF16K16 c"blockem_resident_f16_16",
        ResidentF16K24 c"blockem_resident_f16_24",
        ResidentF16K32 c"blockem_resident_f16_32",
        ResidentBf16K8 c"blockem_resident_bf16_8",
        ResidentBf16K16 c"blockem_resident_bf16_16",
        ResidentBf16K24 c"blockem_resident_bf16_24",
        ResidentBf16K32 c"blockem_resident_bf16_32",
        EncodeF32Sm90 c"blockem_encode_f32_sm90",
        EncodeF16Sm90 c"blockem_encode_f16_sm90",
        EncodeBf16Sm90 c"blockem_encode_bf16_sm90",
        GradientF32Sm90 c"blockem_gradient_f32_sm90",
        GradientF16Sm90 c"blockem_gradient_f16_sm90",
        GradientBf16Sm90 c"blockem_gradient_bf16_sm90",
    }
}

impl Kernel {
    /// The largest dynamic shared memory that it is launched with.
    pub fn shared_limit(self) -> u32 {
        use Kernel::*;
        let bytes = match self {
            Pack | Norm | Pull | GluCoefficients | Stats | Steer | TokenNorms => 0,
            GluLatents => GLU_SHARED,
            TopK => TOPK_SHARED,
            ReduceLatents | ReduceTotal => REDUCE_SHARED,
            GradientF32Few | GradientF16Few | GradientBf16Few | GradientF32Wide
            | GradientF16Wide | GradientBf16Wide => gradient_shared(self),
            _ if self.family() == Family::Sm90 => sm90::SHARED_MOST,
            _ => ENCODE_TILES.iter().find(|t| t.kernel == self).map_or(0, EncodeTile::shared),
        };
        bytes as u32
    }

    /// Whether devices of a target have it.
    pub fn is_of(self, target: Target) -> bool {
        match self.family() {
            Family::Any => true,
            Family::Portable => target == Target::Portable,
            Family::Sm90 => target != Target::Portable,
        }
    }
}

/// What a device runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Target {
    #[default]
    Portable,
    /// Compute capability 9.0, and how many clusters of four and of eight blocks with most of the
    /// shared memory run there at a time.
    Sm90 { clusters: [u32; 2] },
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Launch {
    pub kernel: Kernel,
    pub grid: [u32; 3],
    /// Blocks of a cluster, along x.
    pub cluster: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    pub params: Params,
}
