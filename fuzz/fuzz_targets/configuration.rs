//! The configuration file: a mistake is an error in words, never a panic.

#![no_main]

use coldspare_cli::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = Config::parse(text) {
        let _ = config.tuning();
        for root in &config.roots {
            root.exclude().expect("checked when it was read");
        }
    }
});
