//! Progress bars, on a terminal only.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

/// A bar on standard error; silent when that is no terminal.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// A bar for `what`.
    pub(crate) fn new(what: &'static str) -> Bar {
        let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target).with_message(what);
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {human_pos}/{human_len} {prefix} {eta}") {
            bar.set_style(style);
        }
        Bar(bar)
    }

    /// A line for `what`, of which nobody knows the end.
    pub(crate) fn spinner(what: &'static str) -> Bar {
        let Bar(bar) = Bar::new(what);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {prefix} {elapsed}") {
            bar.set_style(style);
        }
        Bar(bar)
    }

    /// Shows how much was sent.
    pub(crate) fn show_bytes(&self, bytes: u64) {
        self.0.set_prefix(indicatif::HumanBytes(bytes).to_string());
        self.0.tick();
    }

    /// Shows `{"done", "of", "bytes"}`.
    pub(crate) fn show(&self, value: &Value) {
        let number = |key: &str| value[key].as_u64().unwrap_or_default();
        self.0.set_length(number("of"));
        self.0.set_position(number("done"));
        self.0.set_prefix(indicatif::HumanBytes(number("bytes")).to_string());
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}
