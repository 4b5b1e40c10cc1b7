//! The kernels' parameters: the structs of kernels/params.cuh.

use std::ffi::c_void;

/// A kernel's only parameter, by value. The structs are those of kernels/params.cuh.
#[derive(Clone, Copy, Debug)]
pub enum Params {
    Pack(PackParams),
    Encode(EncodeParams),
    Gradient(GradientParams),
    Resident(ResidentParams),
    Reduce(ReduceParams),
    Norm(NormParams),
    Pull(PullParams),
    TopK(TopKParams),
    GluLatents(GluLatentsParams),
    Glu(GluParams),
    Stats(StatsParams),
    Steer(SteerParams),
    TokenNorms(TokenNormsParams),
}

impl Params {
    /// What an entry of `kernelParams` points to.
    pub fn as_ptr(&self) -> *const c_void {
        match self {
            Params::Pack(p) => (&raw const *p).cast(),
            Params::Encode(p) => (&raw const *p).cast(),
            Params::Gradient(p) => (&raw const *p).cast(),
            Params::Resident(p) => (&raw const *p).cast(),
            Params::Reduce(p) => (&raw const *p).cast(),
            Params::Norm(p) => (&raw const *p).cast(),
            Params::Pull(p) => (&raw const *p).cast(),
            Params::TopK(p) => (&raw const *p).cast(),
            Params::GluLatents(p) => (&raw const *p).cast(),
            Params::Glu(p) => (&raw const *p).cast(),
            Params::Stats(p) => (&raw const *p).cast(),
            Params::Steer(p) => (&raw const *p).cast(),
            Params::TokenNorms(p) => (&raw const *p).cast(),
        }
    }

    #[cfg(test)]
    pub fn bytes(&self) -> &[u8] {
        let size = match self {
            Params::Pack(_) => size_of::<PackParams>(),
            Params::Encode(_) => size_of::<EncodeParams>(),
            Params::Gradient(_) => size_of::<GradientParams>(),
            Params::Resident(_) => size_of::<ResidentParams>(),
            Params::Reduce(_) => size_of::<ReduceParams>(),
            Params::Norm(_) => size_of::<NormParams>(),
            Params::Pull(_) => size_of::<PullParams>(),
            Params::TopK(_) => size_of::<TopKParams>(),
            Params::GluLatents(_) => size_of::<GluLatentsParams>(),
            Params::Glu(_) => size_of::<GluParams>(),
            Params::Stats(_) => size_of::<StatsParams>(),
            Params::Steer(_) => size_of::<SteerParams>(),
            Params::TokenNorms(_) => size_of::<TokenNormsParams>(),
        };
        // SAFETY: the struct has this size, and no padding: its fields' sizes add up to it.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size) }
    }
}

macro_rules! params {
    ($(#[$doc:meta] $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            #[$doc]
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            pub struct $name {
                $(pub $field: $type,)*
            }

            // `Params::bytes` relies on it.
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*);
        )*

        /// Sizes and offsets as kernels/params.cuh must have them.
        #[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
        pub fn layout() -> String {
            let mut lines = String::new();
            $(
                lines += &format!("{} {}\n", stringify!($name), size_of::<$name>());
                $(lines += &format!(
                    "{}.{} {}\n",
                    stringify!($name),
                    stringify!($field),
                    std::mem::offset_of!($name, $field)
                );)*
            )*
            lines
        }
    };
}

params! {
    /// Encoder rows on the device.
    RowsParams {
        packed: u64,
        bias: u64,
        scale: u64,
        gate_values: u64,
        sign_weight: u64,
        group: u64,
        groups: u32,
        by_magnitude: u32,
        count: u32,
        padded_count: u32,
        d_in: u32,
        gate: u32,
    }

    /// Hidden states.
    HiddenParams {
        data: u64,
        stride: u64,
        dtype: u32,
        is_aligned: u32,
    }

    /// A number for each token.
    MaskParams {
        data: u64,
        stride: u64,
        is_f32: u64,
    }

    /// kernels/pack.cu
    PackParams {
        weight: u64,
        weight_stride: u64,
        packed: u64,
        count: u32,
        padded_count: u32,
        d_in: u32,
        slices: u32,
    }

    /// kernels/encode.cu. Absent outputs are 0; with `latents` the rest of the outputs is absent.
    EncodeParams {
        rows: RowsParams,
        hidden: HiddenParams,
        mask: MaskParams,
        token_scales: u64,
        thresholds: u64,
        latents: u64,
        latents_stride: u64,
        reference: u64,
        reference_stride: u64,
        coef: u64,
        coef_stride: u64,
        dots: u64,
        dots_stride: u64,
        loss_partials: u64,
        count_partials: u64,
        tokens: u64,
    }

    /// kernels/topk.cu
    TopKParams {
        pre: u64,
        pre_stride: u64,
        largest: u64,
        floors: u64,
        thresholds: u64,
        mask: MaskParams,
        first: u32,
        count: u32,
        k: u32,
        groups: u32,
        group_size: u32,
        by_magnitude: u32,
    }

    /// kernels/norm.cu
    NormParams {
        hidden: HiddenParams,
        mask: MaskParams,
        coef: u64,
        coef_stride: u64,
        scales: u64,
        means: u64,
        slopes: u64,
        live: u64,
        tokens: u64,
        norm: u64,
        d_in: u32,
        count: u32,
    }

    /// kernels/norm.cu
    PullParams {
        coef: u64,
        coef_stride: u64,
        dots: u64,
        dots_stride: u64,
        scales: u64,
        means: u64,
        slopes: u64,
        pulls: u64,
        scale_tensor: u64,
        scale: f64,
        tokens: u64,
        count: u64,
    }

    /// kernels/glu.cu
    GluLatentsParams {
        encode: EncodeParams,
        bias: u64,
        glu_bias: u64,
    }

    /// kernels/glu.cu
    GluParams {
        coef: u64,
        coef_stride: u64,
        dots: u64,
        dots_stride: u64,
        bias: u64,
        glu_bias: u64,
        out: u64,
        out_stride: u64,
        tokens: u64,
        count: u64,
    }

    /// kernels/gradient.cu
    GradientParams {
        packed: u64,
        coef: u64,
        coef_stride: u64,
        grad: u64,
        grad_stride: u64,
        scale_tensor: u64,
        scale: f64,
        pulls: u64,
        hidden: HiddenParams,
        tokens: u64,
        count: u32,
        padded_count: u32,
        d_in: u32,
        tiles_per_cta: u32,
        column_tiles: u32,
        accumulate: u32,
        coef_is_aligned: u32,
        grad_is_aligned: u32,
    }

    /// kernels/resident_sm90.cu. Without hidden states or rows of dH it leaves those out.
    ResidentParams {
        encode: EncodeParams,
        gradient: GradientParams,
        tiles: u64,
        clusters: u32,
        stages: u32,
        slices: u32,
        padding: u32,
    }

    /// An output of one or more numbers.
    OutputParams {
        data: u64,
        stride: u64,
        is_f64: u64,
    }

    /// kernels/reduce.cu
    ReduceParams {
        loss_partials: u64,
        count_partials: u64,
        latent_sums: u64,
        tiles: u64,
        tokens: u64,
        loss_sum: OutputParams,
        token_count: OutputParams,
        latent_loss: OutputParams,
        count: u32,
        padded_count: u32,
    }

    /// kernels/stats.cu
    StatsParams {
        latents: u64,
        base: u64,
        stride: u64,
        mask: MaskParams,
        state: u64,
        state_stride: u64,
        token_count: u64,
        tokens: u64,
        count: u32,
        accumulate: u32,
    }

    /// kernels/steer.cu
    SteerParams {
        directions: u64,
        directions_stride: u64,
        hidden: HiddenParams,
        hidden_stride: u64,
        row: u64,
        row_stride: u64,
        strength: u64,
        strength_stride: u64,
        mask: MaskParams,
        mask_stride: u64,
        scale_tensor: u64,
        scale: f64,
        batch: u64,
        positions: u64,
        column_tiles: u64,
        count: u32,
        d_in: u32,
    }

    /// kernels/norm.cu
    TokenNormsParams {
        hidden: HiddenParams,
        norms: OutputParams,
        tokens: u64,
        d_in: u64,
    }
}
