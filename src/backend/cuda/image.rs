//! The kernels' images, which build.rs made, and the modules that contexts load from them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::driver::sys::CUdevice_attribute;

use super::driver::{Context, Function, LoadedImage, Shape, Version, require_version};
use super::launch::{Kernel, Target};
use crate::error::{Result, bail};

// IMAGES: one fatbin for each kernels/*.cu; TOOLKIT: the CUDA version of the nvcc that made them.
include!(concat!(env!("OUT_DIR"), "/images.rs"));

pub(super) const MADE_BY: Version = Version(TOOLKIT);

/// The driver reads 64-bit fields from an image where it lies.
#[repr(C, align(16))]
struct Aligned<Bytes: ?Sized>(Bytes);

/// Whether this build has kernels.
pub(crate) const fn is_embedded() -> bool {
    !IMAGES.is_empty()
}

/// Refuses what can never run, before anything is created on a device.
pub(super) fn check_driver(version: Version) -> Result<()> {
    if !is_embedded() {
        bail!(
            NoKernelImage,
            "this build of libblockem has no CUDA kernels: no nvcc was found when it was made; \
             build it again with nvcc on PATH, or in CUDA_HOME, or named by BLOCKEM_NVCC"
        );
    }
    // Kernels of a toolkit load in every driver of its major version and in later ones.
    let needed = Version(TOOLKIT / 1000 * 1000);
    require_version(version, needed, "the kernels of this build of libblockem")
}

/// The kernels in one context, ready to be launched.
pub(super) struct Module {
    /// None for kernels of other targets.
    functions: [Option<Function>; Kernel::ALL.len()],
    _images: Vec<LoadedImage>,
    pub context: Arc<Context>,
    pub target: Target,
    /// Whether a kernel may start while the one before it ends.
    pub overlaps: bool,
    /// Of the device: major and minor.
    capability: [i32; 2],
}

impl Module {
    /// Loaded once for each context, whatever the number of plans in it. `pin` keeps it for calls
    /// without a plan, to the end of the process.
    pub fn of(context: Context, pin: bool) -> Result<Arc<Module>> {
        let mut loaded = loaded_modules();
        if let Some(entry) = loaded.iter_mut().find(|entry| entry.context == context.id())
            && let Some(module) = entry.module.upgrade()
        {
            if pin && entry.pinned.is_none() {
                entry.pinned = Some(module.clone());
            }
            return Ok(module);
        }
        let module = Arc::new(Module::load(Arc::new(context))?);
        loaded.retain(|entry| entry.module.strong_count() > 0);
        loaded.push(Entry {
            context: module.context.id(),
            module: Arc::downgrade(&module),
            pinned: pin.then(|| module.clone()),
        });
        Ok(module)
    }

    /// The pinned module of a device's context; without a context, of its primary one.
    pub fn pinned(device: i32, context: Option<u64>) -> Option<Arc<Module>> {
        let loaded = loaded_modules();
        let mut modules = loaded.iter().filter_map(|entry| entry.pinned.as_ref());
        let wanted = |module: &&Arc<Module>| {
            let found = &module.context;
            found.device_index() == device
                && context.map_or(found.is_primary(), |context| found.id() == context)
        };
        modules.find(wanted).cloned()
    }

    fn load(context: Arc<Context>) -> Result<Module> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let (major, minor) = (context.attribute(MAJOR)?, context.attribute(MINOR)?);
        if major < 8 {
            bail!(
                NoKernelImage,
                "cuda:{} has compute capability {major}.{minor}; the kernels need 8.0 or later",
                context.device_index()
            );
        }
        let _entered = context.enter()?;
        let is_sm90 = (major, minor) == (9, 0);
        let target = if is_sm90 { Target::Sm90 { clusters: [0; 2] } } else { Target::Portable };
        let images = IMAGES
            .iter()
            .filter(|(name, _)| is_image_of(target, name))
            .map(|(name, image)| LoadedImage::new(&context, name, &image.0))
            .collect::<Result<Vec<_>>>()?;
        let mut functions = [None; Kernel::ALL.len()];
        for kernel in Kernel::ALL.iter().filter(|kernel| kernel.is_of(target)) {
            functions[*kernel as usize] = Some(find(&images, *kernel)?);
        }
        drop(_entered);
        let capability = [major, minor];
        // Graphs keep it from CUDA 12.3 on.
        let overlaps = major >= 9 && context.driver().version() >= Version(12030);
        let mut module =
            Module { functions, _images: images, context, target, overlaps, capability };
        if is_sm90 {
            module.target = Target::Sm90 { clusters: module.clusters_at_once()? };
        }
        Ok(module)
    }

    /// Of four and of eight blocks that have most of a multiprocessor's shared memory each.
    fn clusters_at_once(&self) -> Result<[u32; 2]> {
        let kernel = Kernel::ResidentBf16K24;
        let _entered = self.context.enter()?;
        let mut clusters = [0; 2];
        for (count, cluster) in clusters.iter_mut().zip([4, 8]) {
            let shared = kernel.shared_limit();
            let shape =
                Shape { grid: [cluster, 1, 1], cluster, block: 256, shared, overlaps: false };
            let function = self.function(kernel)?;
            *count = function.clusters_at_once(self.context.driver(), &shape)?;
        }
        Ok(clusters)
    }

    /// Tensor cores of different generations round the same sums differently.
    pub fn numerics(&self) -> String {
        let [major, minor] = self.capability;
        format!("cuda-2-sm{major}{minor}")
    }

    pub fn function(&self, kernel: Kernel) -> Result<Function> {
        let name = kernel.name().to_string_lossy();
        match self.functions[kernel as usize] {
            Some(function) => Ok(function),
            None => bail!(Internal, "the kernel {name} is not one of this device"),
        }
    }
}

/// Kernels of kernels/NAME_sm90.cu stand in for those of NAME.cu on devices of compute capability 9.0,
/// and have no image for others.
fn is_image_of(target: Target, name: &str) -> bool {
    match target {
        Target::Portable => !name.ends_with("_sm90"),
        Target::Sm90 { .. } => !IMAGES.iter().any(|(other, _)| *other == format!("{name}_sm90")),
    }
}

fn find(images: &[LoadedImage], kernel: Kernel) -> Result<Function> {
    for image in images {
        if let Some(function) = image.function(kernel.name(), kernel.shared_limit())? {
            return Ok(function);
        }
    }
    bail!(Internal, "no image has the kernel {}", kernel.name().to_string_lossy())
}

struct Entry {
    /// [`Context::id`], which outlives the handle.
    context: u64,
    module: Weak<Module>,
    pinned: Option<Arc<Module>>,
}

fn loaded_modules() -> MutexGuard<'static, Vec<Entry>> {
    static LOADED: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    /// `make test` runs this in builds with kernels and without.
    #[test]
    fn a_driver_is_refused_before_anything_is_made() {
        let answer = |version| check_driver(Version(version)).map_err(|e| (e.status, e.message));
        let own = TOOLKIT / 1000 * 1000;
        if !is_embedded() {
            let (status, message) = answer(99000).unwrap_err();
            assert_eq!(status, Status::NoKernelImage);
            assert!(message.contains("BLOCKEM_NVCC"), "{message}");
            return;
        }
        for version in [own, own + 90, own + 1000] {
            assert_eq!(answer(version), Ok(()));
        }
        let (status, message) = answer(own - 10).unwrap_err();
        assert_eq!(status, Status::DriverTooOld);
        for version in [Version(own - 10), Version(own)] {
            assert!(message.contains(&version.to_string()), "{version} is not in {message:?}");
        }
    }
}
