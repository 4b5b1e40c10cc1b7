//! The CUDA driver: opened when a call first asks for it, and owners for what it hands out.
//!
//! Types and constants are cudarc's. The table of functions is ours, because cudarc's panics where
//! the library or a symbol is missing, tries a toolkit's link-time stub before the driver, and
//! reads results into an enum that a newer driver can leave.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUfunction, CUfunction_attribute,
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, CUmodule, CUpointer_attribute,
    CUresult, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus,
};
use libloading::Library;

use super::image::MADE_BY;
use crate::error::{Error, Result, Status, bail};

/// cuCtxGetId and everything else in the table are in every driver from here on.
const OLDEST_DRIVER: Version = Version(12000);

/// A result as it comes: a newer driver may answer numbers that cudarc does not know.
type Code = c_uint;

/// A CUDA version as the driver counts: 1000 major + 10 minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub c_int);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Declares the table: a field for each function, and how all are found.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ty),*);)*) => {
        #[allow(non_snake_case)]
        struct Functions { $($field: unsafe extern "system" fn($($argument),*) -> Code,)* }

        impl Functions {
            fn find(library: &Library) -> Result<Functions> {
                // SAFETY: the types are those of the driver's header.
                unsafe { Ok(Functions { $($field: find(library, stringify!($symbol))?,)* }) }
            }
        }
    };
}

functions! {
    init = cuInit(c_uint);
    error_name = cuGetErrorName(Code, *mut *const c_char);
    error_string = cuGetErrorString(Code, *mut *const c_char);
    device_count = cuDeviceGetCount(*mut c_int);
    device_get = cuDeviceGet(*mut CUdevice, c_int);
    device_attribute = cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
    primary_state = cuDevicePrimaryCtxGetState(CUdevice, *mut c_uint, *mut c_int);
    primary_retain = cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    primary_release = cuDevicePrimaryCtxRelease_v2(CUdevice);
    context_current = cuCtxGetCurrent(*mut CUcontext);
    context_device = cuCtxGetDevice(*mut CUdevice);
    context_id = cuCtxGetId(CUcontext, *mut c_ulonglong);
    context_push = cuCtxPushCurrent_v2(CUcontext);
    context_pop = cuCtxPopCurrent_v2(*mut CUcontext);
    module_load = cuModuleLoadData(*mut CUmodule, *const c_void);
    module_unload = cuModuleUnload(CUmodule);
    module_function = cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    function_set = cuFuncSetAttribute(CUfunction, CUfunction_attribute, c_int);
    memory_alloc = cuMemAlloc_v2(*mut CUdeviceptr, usize);
    memory_free = cuMemFree_v2(CUdeviceptr);
    copy_in = cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    copy_out = cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    pointer_attributes = cuPointerGetAttributes(
        c_uint, *const CUpointer_attribute, *mut *mut c_void, CUdeviceptr
    );
    stream_create = cuStreamCreate(*mut CUstream, c_uint);
    stream_destroy = cuStreamDestroy_v2(CUstream);
    stream_context = cuStreamGetCtx(CUstream, *mut CUcontext);
    stream_synchronize = cuStreamSynchronize(CUstream);
    stream_capturing = cuStreamIsCapturing(CUstream, *mut c_uint);
    exchange_capture_mode = cuThreadExchangeStreamCaptureMode(*mut CUstreamCaptureMode);
    launch = cuLaunchKernelEx(
        *const CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void
    );
    clusters_at_once = cuOccupancyMaxActiveClusters(
        *mut c_int, CUfunction, *const CUlaunchConfig
    );
}

/// # Safety
/// `T` must be the type of the function of that name.
unsafe fn find<T: Copy>(library: &Library, name: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    match unsafe { library.get::<T>(name.as_bytes()) } {
        Ok(function) => Ok(*function),
        Err(_) => bail!(
            CudaUnavailable,
            "the CUDA driver library lacks the function {name}: is it NVIDIA's own?"
        ),
    }
}

/// The driver of this process.
pub(super) struct Driver {
    functions: Functions,
    /// cuFuncLoad, from CUDA 12.4 on: without it a lazy driver loads a kernel when it first runs.
    load_function: Option<unsafe extern "system" fn(CUfunction) -> Code>,
    version: Version,
    /// The process that initialised it: a child of fork has the memory, not the devices.
    process: u32,
}

impl Driver {
    /// Opened once; a failure is final, as it is for the driver itself.
    pub fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        let driver = DRIVER.get_or_init(Driver::open).as_ref().map_err(Error::clone)?;
        driver.check_process()?;
        Ok(driver)
    }

    fn open() -> Result<Driver> {
        let library = open_library()?;
        // SAFETY: the type is that of the driver's header.
        let driver_version: unsafe extern "system" fn(*mut c_int) -> Code =
            unsafe { find(&library, "cuDriverGetVersion")? };
        let mut version = 0;
        // SAFETY: a place for the result; needs no cuInit.
        unsafe { driver_version(&mut version) };
        let version = Version(version);
        require_version(version, OLDEST_DRIVER, "libblockem")?;
        let functions = Functions::find(&library)?;
        // SAFETY: the type is that of the driver's header.
        let load_function = unsafe { find(&library, "cuFuncLoad").ok() };
        // The driver cannot be unloaded safely: its threads and handlers stay.
        std::mem::forget(library);
        let driver = Driver { functions, load_function, version, process: std::process::id() };
        // SAFETY: the flags must be 0.
        match unsafe { (driver.functions.init)(0) } {
            0 => Ok(driver),
            // What a driver says in a child whose parent had initialised it.
            code if code == CUresult::CUDA_ERROR_NOT_INITIALIZED as Code => Err(forked()),
            code => {
                let Error { message, .. } = driver.error("cuInit", code);
                Err(Error::new(Status::CudaUnavailable, message))
            }
        }
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub fn in_its_process(&self) -> bool {
        self.process == std::process::id()
    }

    fn check_process(&self) -> Result<()> {
        if self.in_its_process() { Ok(()) } else { Err(forked()) }
    }

    fn check(&self, call: &str, code: Code) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(self.error(call, code)) }
    }

    #[cold]
    fn error(&self, call: &str, code: Code) -> Error {
        let text = |get: unsafe extern "system" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: a place for the result, which is NULL or a static string.
            unsafe {
                (get)(code, &mut text);
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy())
            }
        };
        let name = text(self.functions.error_name).unwrap_or("an unknown result".into());
        let said = text(self.functions.error_string).unwrap_or("no text".into());
        let (status, remedy) = status_of(code);
        let versions = match status {
            Status::DriverTooOld => {
                format!("; the driver serves CUDA {}, the kernels are of {MADE_BY}", self.version())
            }
            _ => String::new(),
        };
        Error::new(status, format!("{call}: {name} ({code}): {said}{versions}{remedy}"))
    }

    pub fn device_count(&self) -> Result<i32> {
        let mut count = 0;
        // SAFETY: a place for the result.
        self.check("cuDeviceGetCount", unsafe { (self.functions.device_count)(&mut count) })?;
        Ok(count)
    }

    /// Tells what a pointer is, in one call.
    pub fn pointer(&self, address: u64) -> Result<Pointer> {
        let (mut memory, mut device, mut managed) = (0 as c_uint, -1 as c_int, 0 as c_uint);
        let mut context: CUcontext = std::ptr::null_mut();
        let attributes = [
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT,
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
        ];
        let mut places: [*mut c_void; 4] = [
            (&raw mut context).cast(),
            (&raw mut memory).cast(),
            (&raw mut device).cast(),
            (&raw mut managed).cast(),
        ];
        // SAFETY: as many attributes as places, each of its type; the pointer is only looked up.
        let code = unsafe {
            let (keys, places) = (attributes.as_ptr(), places.as_mut_ptr());
            (self.functions.pointer_attributes)(attributes.len() as c_uint, keys, places, address)
        };
        self.check("cuPointerGetAttributes", code)?;
        // CU_MEMORYTYPE_HOST and CU_MEMORYTYPE_DEVICE.
        Ok(match (managed, memory) {
            (1.., _) => Pointer::Managed,
            (0, 2) => Pointer::Device(device, context),
            (0, 1) => Pointer::Host,
            _ => Pointer::Unknown,
        })
    }

    /// The context of a stream; none where the handle stands for the current context's own.
    pub fn stream_context(&self, stream: *mut c_void) -> Result<Option<CUcontext>> {
        // NULL, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
        if (stream as usize) <= 2 {
            return Ok(None);
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: a stream by the caller's promise, and a place for the result.
        let code = unsafe { (self.functions.stream_context)(stream.cast(), &mut context) };
        self.check("cuStreamGetCtx", code)?;
        Ok(Some(context))
    }

    /// Refuses when a stream is being captured. NULL asks for the blocking streams of the current
    /// context; captures of others show when something that they forbid is called.
    pub fn check_not_capturing(&self, stream: *mut c_void) -> Result<()> {
        let mut status = 0;
        // SAFETY: a stream by the caller's promise, and a place for the result.
        let code = unsafe { (self.functions.stream_capturing)(stream.cast(), &mut status) };
        self.check("cuStreamIsCapturing", code)?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as c_uint {
            bail!(CaptureUnsafe, "the stream is being captured{CAPTURE_REMEDY}");
        }
        Ok(())
    }
}

/// What the driver knows of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pointer {
    /// Of a device, and of a context; NULL where it is of no one context, as pools are.
    Device(i32, CUcontext),
    Managed,
    /// Pinned or registered.
    Host,
    /// Host memory that the driver never saw, freed, or no memory at all.
    Unknown,
}

fn open_library() -> Result<Library> {
    // The driver's own name; libcuda.so without a number may be a toolkit's link-time stub.
    let name = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
    // SAFETY: the driver's initialisers are those that every CUDA program runs.
    match unsafe { Library::new(name) } {
        Ok(library) => Ok(library),
        Err(error) => {
            // The loader's own words are the error's source.
            let said = std::error::Error::source(&error).map(ToString::to_string);
            bail!(
                CudaUnavailable,
                "there is no CUDA driver on this machine ({}); install NVIDIA's, or use the \
                 device CPU",
                said.unwrap_or_else(|| format!("{name}: {error}"))
            )
        }
    }
}

/// Refuses a driver that is older than something needs.
pub(super) fn require_version(found: Version, needed: Version, what: &str) -> Result<()> {
    if found < needed {
        bail!(
            DriverTooOld,
            "the CUDA driver serves CUDA {found}, {what} needs {needed} or later; install a newer \
             driver"
        );
    }
    Ok(())
}

#[cold]
fn forked() -> Error {
    Error::new(
        Status::Forked,
        "this process was forked from one that had initialised CUDA, which cannot serve a child; \
         start workers by spawn or forkserver, or make the first CUDA call after the fork",
    )
}

const CAPTURE_REMEDY: &str =
    "; make plans, and each context's first raw call, before the capture, and pass its stream";

fn status_of(code: Code) -> (Status, &'static str) {
    const fn number(result: CUresult) -> Code {
        result as Code
    }
    const OUT_OF_MEMORY: Code = number(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    const NO_DEVICE: Code = number(CUresult::CUDA_ERROR_NO_DEVICE);
    const NO_BINARY: Code = number(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    const UNSUPPORTED_PTX: Code = number(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    const CAPTURE_FIRST: Code = number(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    const CAPTURE_LAST: Code = number(CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    match code {
        OUT_OF_MEMORY => (Status::OutOfMemory, ""),
        NO_DEVICE => (Status::CudaUnavailable, ""),
        NO_BINARY => (Status::NoKernelImage, "; the kernels need compute capability 8.0 or later"),
        UNSUPPORTED_PTX => (Status::DriverTooOld, "; install a newer driver"),
        CAPTURE_FIRST..=CAPTURE_LAST => (Status::CaptureUnsafe, CAPTURE_REMEDY),
        _ => (Status::CudaDriver, ""),
    }
}

/// A context that a plan, or the raw calls, work in.
pub(super) struct Context {
    driver: &'static Driver,
    handle: CUcontext,
    device: CUdevice,
    index: i32,
    id: u64,
    /// Primary contexts are shared by count; others belong to the host.
    retained: bool,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The calling thread's current context where it is one of this device, else the device's
    /// primary context.
    pub fn of_device(index: i32) -> Result<Context> {
        let driver = Driver::get()?;
        let device = device(driver, index)?;
        match current(driver)? {
            Some((handle, of)) if of == device => Context::adopt(driver, handle, device, index),
            _ => Context::primary(driver, device, index),
        }
    }

    /// The context of a stream, or that of [`Context::of_device`] where the stream names none.
    pub fn of_stream(index: i32, stream: *mut c_void) -> Result<Context> {
        let driver = Driver::get()?;
        let Some(handle) = driver.stream_context(stream)? else {
            return Context::of_device(index);
        };
        let device = device(driver, index)?;
        let found = {
            let _pushed = Entered::push(driver, handle)?;
            current(driver)?.map(|(_, device)| device)
        };
        if found != Some(device) {
            bail!(DeviceMismatch, "the stream belongs to another device than cuda:{index}");
        }
        Context::adopt(driver, handle, device, index)
    }

    /// The id of the context that [`Context::of_stream`] would find, `None` for the primary one.
    pub fn id_of_stream(index: i32, stream: *mut c_void) -> Result<Option<u64>> {
        let driver = Driver::get()?;
        if let Some(handle) = driver.stream_context(stream)? {
            return context_id(driver, handle).map(Some);
        }
        match current(driver)? {
            Some((handle, of)) if of == device(driver, index)? => {
                context_id(driver, handle).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn primary(driver: &'static Driver, device: CUdevice, index: i32) -> Result<Context> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: a device of the driver and a place for the result.
        let code = unsafe { (driver.functions.primary_retain)(&mut handle, device) };
        driver.check("cuDevicePrimaryCtxRetain", code)?;
        let id = 0;
        let mut context = Context { driver, handle, device, index, id, retained: true };
        context.id = context_id(driver, handle)?;
        Ok(context)
    }

    /// A context that lives already; a primary one is kept alive from now on.
    fn adopt(
        driver: &'static Driver,
        handle: CUcontext,
        device: CUdevice,
        index: i32,
    ) -> Result<Context> {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: a device of the driver and places for the results.
        let code = unsafe { (driver.functions.primary_state)(device, &mut flags, &mut active) };
        driver.check("cuDevicePrimaryCtxGetState", code)?;
        if active != 0 {
            let primary = Context::primary(driver, device, index)?;
            if primary.handle == handle {
                return Ok(primary);
            }
        }
        let id = context_id(driver, handle)?;
        Ok(Context { driver, handle, device, index, id, retained: false })
    }

    pub fn driver(&self) -> &'static Driver {
        self.driver
    }

    pub fn is_primary(&self) -> bool {
        self.retained
    }

    pub fn device_index(&self) -> i32 {
        self.index
    }

    /// Whether memory of this context may be used in it; NULL stands for memory of any.
    pub fn owns(&self, context: CUcontext) -> bool {
        context.is_null() || context == self.handle
    }

    /// Never given again while the process lives, unlike the handle.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: a device of the driver and a place for the result.
        let code =
            unsafe { (self.driver.functions.device_attribute)(&mut value, attribute, self.device) };
        self.driver.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Makes this the thread's current context until the guard goes.
    pub fn enter(&self) -> Result<Entered> {
        self.driver.check_process()?;
        Entered::push(self.driver, self.handle)
    }

    /// For destructors: `None` where nothing is left to be freed, or nobody may free it.
    fn enter_to_free(&self) -> Option<Freeing> {
        // In a child of fork, and once the driver has shut down at exit, there is nothing to do.
        if !self.driver.in_its_process() {
            return None;
        }
        Entered::push(self.driver, self.handle).ok().map(Freeing::new)
    }

    /// Whether a stream is one of this context; NULL and its like are streams of each.
    pub fn owns_stream(&self, stream: *mut c_void) -> Result<bool> {
        self.driver.check_process()?;
        Ok(self.driver.stream_context(stream)?.is_none_or(|found| found == self.handle))
    }

    /// Refuses a stream that belongs to another context.
    pub fn check_stream(&self, stream: *mut c_void) -> Result<()> {
        if !self.owns_stream(stream)? {
            bail!(
                InvalidArgument,
                "the stream belongs to another CUDA context than the plan, which was made in the \
                 one that was current then, or in the device's primary context"
            );
        }
        Ok(())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.retained && self.driver.in_its_process() {
            // SAFETY: retained once by us. At exit the driver may be gone, which is no error.
            unsafe { (self.driver.functions.primary_release)(self.device) };
        }
    }
}

fn device(driver: &Driver, index: i32) -> Result<CUdevice> {
    let count = driver.device_count()?;
    if index >= count {
        let devices = if count == 1 { "1 device".into() } else { format!("{count} devices") };
        bail!(InvalidArgument, "there is no device cuda:{index}: the CUDA driver has {devices}");
    }
    let mut device = 0;
    // SAFETY: a place for the result.
    driver.check("cuDeviceGet", unsafe { (driver.functions.device_get)(&mut device, index) })?;
    Ok(device)
}

/// The thread's current context and its device.
fn current(driver: &Driver) -> Result<Option<(CUcontext, CUdevice)>> {
    let mut handle = std::ptr::null_mut();
    // SAFETY: a place for the result.
    driver.check("cuCtxGetCurrent", unsafe { (driver.functions.context_current)(&mut handle) })?;
    if handle.is_null() {
        return Ok(None);
    }
    let mut device = 0;
    // SAFETY: a place for the result.
    driver.check("cuCtxGetDevice", unsafe { (driver.functions.context_device)(&mut device) })?;
    Ok(Some((handle, device)))
}

fn context_id(driver: &Driver, handle: CUcontext) -> Result<u64> {
    let mut id = 0;
    // SAFETY: a live context and a place for the result.
    driver.check("cuCtxGetId", unsafe { (driver.functions.context_id)(handle, &mut id) })?;
    Ok(id)
}

/// A context is current; what was current before comes back with the drop.
pub(super) struct Entered {
    driver: &'static Driver,
}

impl Entered {
    fn push(driver: &'static Driver, handle: CUcontext) -> Result<Entered> {
        // SAFETY: a context that the driver checks.
        driver
            .check("cuCtxPushCurrent", unsafe { (driver.functions.context_push)(handle) })
            .map(|()| Entered { driver })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pushed by us on this thread.
        unsafe { (self.driver.functions.context_pop)(&mut popped) };
    }
}

/// A context is current in which things may be freed: a capture that another thread makes, in the
/// global mode, must survive it.
struct Freeing {
    entered: Entered,
    /// The thread's own.
    mode: CUstreamCaptureMode,
}

impl Freeing {
    fn new(entered: Entered) -> Freeing {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let mut freeing = Freeing { entered, mode };
        freeing.exchange();
        freeing
    }

    fn exchange(&mut self) {
        // SAFETY: a place for the mode of before.
        unsafe { (self.entered.driver.functions.exchange_capture_mode)(&mut self.mode) };
    }
}

impl Drop for Freeing {
    fn drop(&mut self) {
        self.exchange();
    }
}

/// Device memory, freed in its own context.
pub(crate) struct DeviceMemory {
    context: Arc<Context>,
    address: CUdeviceptr,
}

impl DeviceMemory {
    /// At least one byte, aligned to 256. The context must be current.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<DeviceMemory> {
        let (driver, mut address) = (context.driver, 0);
        // SAFETY: a place for the result.
        let code = unsafe { (driver.functions.memory_alloc)(&mut address, bytes.max(1)) };
        if code != 0 {
            return Err(driver.error(&format!("cuMemAlloc of {bytes} bytes"), code));
        }
        Ok(DeviceMemory { context: context.clone(), address })
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let Some(_freeing) = self.context.enter_to_free() else { return };
        // SAFETY: our own memory.
        unsafe { (self.context.driver.functions.memory_free)(self.address) };
    }
}

/// A stream of our own, apart from the host's, for the work that prepares a plan.
pub(super) struct OwnStream {
    context: Arc<Context>,
    handle: CUstream,
}

impl OwnStream {
    /// The context must be current.
    pub fn new(context: &Arc<Context>) -> Result<OwnStream> {
        const NON_BLOCKING: c_uint = 1;
        let (driver, mut handle) = (context.driver, std::ptr::null_mut());
        // SAFETY: a place for the result.
        let code = unsafe { (driver.functions.stream_create)(&mut handle, NON_BLOCKING) };
        driver.check("cuStreamCreate", code)?;
        Ok(OwnStream { context: context.clone(), handle })
    }

    pub fn as_raw(&self) -> *mut c_void {
        self.handle.cast()
    }

    /// # Safety
    /// The device memory holds as many bytes; the host's stay until the stream is synchronised.
    pub unsafe fn copy_in(&self, to: u64, from: &[u8]) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: the caller's promise.
        let code = unsafe {
            (driver.functions.copy_in)(to, from.as_ptr().cast(), from.len(), self.handle)
        };
        driver.check("cuMemcpyHtoDAsync", code)
    }

    /// # Safety
    /// As [`Self::copy_in`], the other way.
    pub unsafe fn copy_out(&self, to: &mut [u8], from: u64) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: the caller's promise.
        let code = unsafe {
            (driver.functions.copy_out)(to.as_mut_ptr().cast(), from, to.len(), self.handle)
        };
        driver.check("cuMemcpyDtoHAsync", code)
    }

    pub fn synchronize(&self) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: our own stream.
        let code = unsafe { (driver.functions.stream_synchronize)(self.handle) };
        driver.check("cuStreamSynchronize", code)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        let Some(_freeing) = self.context.enter_to_free() else { return };
        // SAFETY: our own stream; its work is done or is dropped with an error.
        unsafe { (self.context.driver.functions.stream_destroy)(self.handle) };
    }
}

/// A loaded image, unloaded in its own context.
pub(super) struct LoadedImage {
    context: Arc<Context>,
    handle: CUmodule,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for LoadedImage {}
// SAFETY: as above.
unsafe impl Sync for LoadedImage {}

impl LoadedImage {
    /// The context must be current.
    pub fn new(context: &Arc<Context>, name: &str, image: &[u8]) -> Result<LoadedImage> {
        let (driver, mut handle) = (context.driver, std::ptr::null_mut());
        // SAFETY: a whole fatbin, which says its own length, and a place for the result.
        let code = unsafe { (driver.functions.module_load)(&mut handle, image.as_ptr().cast()) };
        driver.check(&format!("cuModuleLoadData of the kernels '{name}'"), code)?;
        Ok(LoadedImage { context: context.clone(), handle })
    }

    /// A kernel of this image, loaded to the device and allowed `shared` bytes of dynamic shared
    /// memory; `None` where another image has it. The context must be current.
    pub fn function(&self, name: &CStr, shared: u32) -> Result<Option<Function>> {
        let (driver, mut handle) = (self.context.driver, std::ptr::null_mut());
        // SAFETY: a place for the result and a NUL-terminated name.
        let code =
            unsafe { (driver.functions.module_function)(&mut handle, self.handle, name.as_ptr()) };
        if code == CUresult::CUDA_ERROR_NOT_FOUND as Code {
            return Ok(None);
        }
        driver.check("cuModuleGetFunction", code)?;
        let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of this module.
        let code = unsafe { (driver.functions.function_set)(handle, limit, shared as c_int) };
        driver.check("cuFuncSetAttribute", code)?;
        if let Some(load) = driver.load_function {
            // SAFETY: as above.
            driver.check("cuFuncLoad", unsafe { load(handle) })?;
        }
        Ok(Some(Function(handle)))
    }
}

impl Drop for LoadedImage {
    fn drop(&mut self) {
        let Some(_freeing) = self.context.enter_to_free() else { return };
        // SAFETY: loaded by us; plans that used it are gone.
        unsafe { (self.context.driver.functions.module_unload)(self.handle) };
    }
}

/// A kernel on a device.
#[derive(Clone, Copy)]
pub(super) struct Function(CUfunction);

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How a kernel is launched.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub grid: [u32; 3],
    /// Blocks of a cluster, along x.
    pub cluster: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared: u32,
    /// Whether its blocks may be brought in while the kernel before ends; they wait for it themselves.
    pub overlaps: bool,
}

impl Shape {
    /// Those that differ from a plain launch.
    #[allow(non_snake_case)]
    fn attributes(&self) -> ([CUlaunchAttribute; 2], usize) {
        use CUlaunchAttributeID::{
            CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION as CLUSTER,
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION as OVERLAPS,
        };
        let attribute = |id, value| CUlaunchAttribute { id, pad: [0; 4], value };
        let clusterDim = CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster, y: 1, z: 1 };
        let cluster = attribute(CLUSTER, CUlaunchAttributeValue { clusterDim });
        let programmaticStreamSerializationAllowed = 1;
        let value = CUlaunchAttributeValue { programmaticStreamSerializationAllowed };
        let overlaps = attribute(OVERLAPS, value);
        match (self.cluster > 1, self.overlaps) {
            (true, overlapping) => ([cluster, overlaps], 1 + overlapping as usize),
            (false, overlapping) => ([overlaps, cluster], overlapping as usize),
        }
    }

    /// `attributes` must outlive what comes back.
    fn config(&self, attributes: &mut [CUlaunchAttribute], stream: *mut c_void) -> CUlaunchConfig {
        let [x, y, z] = self.grid;
        CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream.cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as c_uint,
        }
    }
}

impl Function {
    /// # Safety
    /// The context of the function is current, the stream is one of its own, and `params` points to
    /// what the kernel takes, with addresses that are valid until its work is done.
    pub unsafe fn launch(
        self,
        driver: &Driver,
        shape: &Shape,
        params: *const c_void,
        stream: *mut c_void,
    ) -> Result<()> {
        let (mut params, extra) = ([params.cast_mut()], std::ptr::null_mut());
        let params = params.as_mut_ptr();
        let (mut attributes, count) = shape.attributes();
        let config = shape.config(&mut attributes[..count], stream);
        // SAFETY: the caller's promise; everything is copied before the call returns.
        let code = unsafe { (driver.functions.launch)(&config, self.0, params, extra) };
        driver.check("cuLaunchKernelEx", code)
    }

    /// How many clusters of this shape the device runs at a time, whatever the grid. The context must
    /// be current.
    pub fn clusters_at_once(self, driver: &Driver, shape: &Shape) -> Result<u32> {
        let mut clusters = 0;
        let (mut attributes, count) = shape.attributes();
        let config = shape.config(&mut attributes[..count], std::ptr::null_mut());
        // SAFETY: a function of the driver, a whole description and a place for the result.
        let code = unsafe { (driver.functions.clusters_at_once)(&mut clusters, self.0, &config) };
        driver.check("cuOccupancyMaxActiveClusters", code)?;
        Ok(clusters.max(0) as u32)
    }
}
