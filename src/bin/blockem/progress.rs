//! A progress bar on standard error, for work that turns out to be long.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work that ends sooner shows no bar.
const QUIET: Duration = Duration::from_millis(500);

/// A callback of (done, total) that draws a bar once the work has taken a while.
pub fn bar(what: &'static str, unit_is_bytes: bool) -> impl FnMut(u64, u64) {
    let (start, mut bar) = (Instant::now(), None);
    move |done, total| {
        if bar.is_none() && start.elapsed() > QUIET && done < total {
            bar = Some(new_bar(what, unit_is_bytes, total));
        }
        if let Some(bar) = &bar {
            let bar: &ProgressBar = bar;
            bar.set_position(done);
            if done == total {
                bar.finish_and_clear();
            }
        }
    }
}

fn new_bar(what: &'static str, unit_is_bytes: bool, total: u64) -> ProgressBar {
    let template = match unit_is_bytes {
        true => "{msg} {wide_bar} {bytes} of {total_bytes}, {eta} left",
        false => "{msg} {wide_bar} {pos} of {len}, {eta} left",
    };
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    // A template that does not parse leaves the default look.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.with_message(what)
}
