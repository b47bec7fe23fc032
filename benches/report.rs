//! Figures, the machine they were taken on, and commands that have to succeed.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Of an even number of values the mean of the middle two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Median, lowest and highest.
pub(crate) fn spread(values: &[f64]) -> String {
    if values.is_empty() {
        return "not installed".into();
    }
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
    format!("{} ({}–{})", figure(median(values)), figure(low), figure(high))
}

/// Three digits or so.
pub(crate) fn figure(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// CPU, cores, memory, kernel and filesystem in a line.
pub(crate) fn describe_machine(dir: &Path) -> String {
    let field = |file: &str, name: &str| -> String {
        let text = fs::read_to_string(file).unwrap_or_default();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim));
        value.unwrap_or("unknown").to_string()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let filesystem = run(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir)).unwrap_or_default();
    format!(
        "{}, {cores} cores, {} of memory, Linux {}, {}",
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal"),
        kernel.trim(),
        filesystem.trim()
    )
}

/// The first line of `PROGRAM --version`; nothing when it isn't installed.
pub(crate) fn program_version(program: &str) -> Option<String> {
    run(Command::new(program).arg("--version")).ok()?.lines().next().map(String::from)
}

/// Runs a command to its end and gives back what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
