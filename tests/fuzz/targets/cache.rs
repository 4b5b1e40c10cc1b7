#![no_main]

use blockem_fuzz::caches;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| caches::cache(bytes));
