//! Whole processes side by side: coldspare and an rsync daemon, in turn, on the same home.
//!
//! `cargo bench --bench compare -- [seed] [rescan] [memory] [packed] [--files N] [--runs N] [--dir DIR] [--json FILE]`
//!
//! Both ends run on this host over loopback, with a warm page cache. rsync runs without encryption; its time to seed
//! includes a `sync -f` of the destination, because coldspare returns only when everything is durable. Each run checks
//! that both made the same tree. Only ratios within one run of this command mean anything.

mod home;
mod process;

use std::error::Error;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use home::Made;
use process::{Cost, Daemon, measure};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What was asked for.
struct Settings {
    sections: Vec<String>,
    files: u64,
    runs: usize,
    dir: PathBuf,
    json: Option<PathBuf>,
}

/// One tool's way from an empty destination to a second run that finds nothing to do.
struct Run {
    seed: Cost,
    rescan: Cost,
    bytes_sent: u64,
}

#[derive(Default)]
struct Runs {
    coldspare: Vec<Run>,
    rsync: Vec<Run>,
}

fn main() -> Result<()> {
    let settings = settings()?;
    let machine = describe_machine(&settings.dir);
    println!("{machine}\n");
    let rsync = program_version("rsync");
    println!("coldspare {} beside {}", env!("CARGO_PKG_VERSION"), rsync.as_deref().unwrap_or("NOTHING: rsync is not installed"));
    println!("page cache warm; {} runs each, in turn; median (lowest–highest)\n", settings.runs);

    let wants = |section: &str| settings.sections.iter().any(|s| s == section);
    let mut tables = Vec::new();
    if wants("seed") || wants("rescan") || wants("memory") {
        tables.push(compare("loose", &settings, rsync.is_some(), |dir| home::make_loose(dir, settings.files, SEED))?);
    }
    if wants("packed") {
        tables.push(compare("packed", &settings, rsync.is_some(), |dir| home::make_packed(dir, PACKED_BYTES, SEED))?);
    }
    if let Some(path) = &settings.json {
        let all = json!({"machine": machine, "coldspare": env!("CARGO_PKG_VERSION"), "rsync": rsync, "homes": tables});
        fs::write(path, serde_json::to_vec_pretty(&all)?)?;
    }
    Ok(())
}

fn settings() -> Result<Settings> {
    let mut settings = Settings { sections: Vec::new(), files: 300_000, runs: 3, dir: env!("CARGO_TARGET_TMPDIR").into(), json: None };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} takes a value"));
        match arg.as_str() {
            "seed" | "rescan" | "memory" | "packed" => settings.sections.push(arg),
            "--files" => settings.files = value()?.parse()?,
            "--runs" => settings.runs = value()?.parse::<usize>()?.max(1),
            "--dir" => settings.dir = value()?.into(),
            "--json" => settings.json = Some(value()?.into()),
            _ => return Err(format!("unknown argument {arg:?}; see the head of benches/compare.rs").into()),
        }
    }
    if settings.sections.is_empty() {
        settings.sections = ["seed", "rescan", "memory"].map(String::from).into();
    }
    Ok(settings)
}

/// Makes a home, runs the tools on it in turn and prints the table.
fn compare(name: &str, settings: &Settings, has_rsync: bool, make: impl Fn(&Path) -> std::io::Result<Made>) -> Result<Value> {
    let dir = tempfile::Builder::new().prefix("coldspare-compare-").tempdir_in(&settings.dir)?;
    let source = dir.path().join("home");
    fs::create_dir(&source)?;
    let made = make(&source)?;
    println!("{name}: {} files, {:.0} MB of content\n", made.files, made.bytes as f64 / 1e6);
    let mut runs = Runs::default();
    for no in 1..=settings.runs {
        runs.coldspare.push(in_fresh(dir.path(), |at| run_coldspare(&source, at))?);
        if has_rsync {
            runs.rsync.push(in_fresh(dir.path(), |at| run_rsync(&source, at))?);
        }
        let seconds = |runs: &[Run]| runs.last().map_or("-".into(), |r| format!("{:.2} s", r.seed.seconds));
        eprintln!("{name}, run {no}: seed coldspare {}, rsync {}", seconds(&runs.coldspare), seconds(&runs.rsync));
    }
    let wants = |section: &str| name == "packed" || settings.sections.iter().any(|s| s == section);
    Ok(json!({"home": name, "files": made.files, "bytes": made.bytes, "rows": print_table(&runs, wants)}))
}

/// Runs `work` in a new folder, with nothing of an earlier run left to be written.
///
/// The folder stays until the end: ext4 passes over inodes that were deleted within the last minutes, one by one, and the
/// next tool to create files would pay for it.
fn in_fresh<T>(dir: &Path, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let at = tempfile::Builder::new().prefix("run-").tempdir_in(dir)?.keep();
    run(Command::new("sync").arg("-f").arg(dir))?;
    work(&at)
}

fn run_coldspare(source: &Path, at: &Path) -> Result<Run> {
    let destination = at.join("standby");
    fs::create_dir(&destination)?;
    let (standby, active, log) = (at.join("standby.toml"), at.join("active.toml"), at.join("receive.log"));
    let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let coldspare = || Command::new(env!("CARGO_BIN_EXE_coldspare"));
    let init = |role: &str, home: &Path, config: &Path| {
        let mut command = coldspare();
        command.args(["init", role, "--home"]).arg(home).arg("--config").arg(config);
        command
    };
    let invite = run(init("standby", &destination, &standby).args(["--listen", &format!("127.0.0.1:{port}")]))?;
    // The source keeps the mark of an earlier run's pair.
    let mark = source.join(".coldspare");
    if mark.exists() {
        fs::remove_dir_all(&mark)?;
    }
    run(init("active", source, &active).args(["--invite", invite.trim()]))?;
    let is_ready = || fs::read_to_string(&log).is_ok_and(|text| text.lines().any(|line| line == "ready"));
    let daemon = Daemon::start(coldspare().arg("receive").arg("--config").arg(&standby), &log, is_ready)?;
    let send = || {
        let mut command = coldspare();
        command.args(["send", "--once", "--json", "--config"]).arg(&active);
        command
    };
    let seed = measure(&mut send(), &daemon)?;
    let rescan = measure(&mut send(), &daemon)?;
    drop(daemon);
    check_equal(source, &destination)?;
    let told: Value = serde_json::from_str(&seed.stdout)?;
    let bytes_sent = told["bytes_sent"].as_u64().ok_or("no bytes_sent in the output of send")?;
    Ok(Run { seed, rescan, bytes_sent })
}

fn run_rsync(source: &Path, at: &Path) -> Result<Run> {
    let destination = at.join("standby");
    fs::create_dir(&destination)?;
    let (config, log) = (at.join("rsyncd.conf"), at.join("rsyncd.log"));
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let owner = if rustix::process::geteuid().is_root() { "uid = root\ngid = root\n" } else { "" };
    let module = format!("use chroot = no\n{owner}[standby]\npath = {}\nread only = no\n", destination.display());
    fs::write(&config, module)?;
    let mut serve = Command::new("rsync");
    serve.args(["--daemon", "--no-detach", "--address=127.0.0.1", &format!("--port={port}")]);
    serve.arg(format!("--config={}", config.display()));
    let daemon = Daemon::start(&mut serve, &log, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())?;
    let push = || {
        let mut command = Command::new("rsync");
        command.args(["-aHAX", "--delete", "--stats", "--exclude=/.coldspare"]);
        command.arg(format!("{}/", source.display())).arg(format!("rsync://127.0.0.1:{port}/standby/"));
        command
    };
    let mut seed = measure(&mut push(), &daemon)?;
    let start = Instant::now();
    run(Command::new("sync").arg("-f").arg(&destination))?;
    seed.seconds += start.elapsed().as_secs_f64();
    let rescan = measure(&mut push(), &daemon)?;
    drop(daemon);
    check_equal(source, &destination)?;
    let told = seed.stdout.lines().find_map(|line| line.strip_prefix("Total bytes sent:")).ok_or("no total in rsync's output")?;
    let bytes_sent = told.chars().filter(char::is_ascii_digit).collect::<String>().parse()?;
    Ok(Run { seed, rescan, bytes_sent })
}

/// Fails unless both trees are equal in every entry, attribute and byte, by rsync's own judgement where it is there.
fn check_equal(source: &Path, destination: &Path) -> Result<()> {
    let mut command = Command::new("rsync");
    command.args(["-aHAXnc", "--delete", "--itemize-changes", "--exclude=/.coldspare"]);
    command.arg(format!("{}/", source.display())).arg(format!("{}/", destination.display()));
    if program_version("rsync").is_none() {
        run(Command::new("diff").arg("-r").arg("--exclude=.coldspare").arg(source).arg(destination))?;
        return Ok(());
    }
    let differences = run(&mut command)?;
    // The mark of the pair is made in the root and changes its time.
    let mut differences = differences.lines().filter(|line| !line.ends_with(" ./"));
    match differences.next() {
        None => Ok(()),
        Some(first) => Err(format!("the trees differ: {first} and {} more", differences.count()).into()),
    }
}

/// What is measured: a key for JSON, words for the table, and how it is read from a run.
type Row = (&'static str, &'static str, fn(&Run) -> f64);

/// Prints the rows that are wanted and gives them back with every run's value.
fn print_table(runs: &Runs, wants: impl Fn(&str) -> bool) -> Vec<Value> {
    let rows: [Row; 9] = [
        ("seed", "seed, durable, s", |r| r.seed.seconds),
        ("seed", "seed, CPU of the sending side, s", |r| r.seed.client_cpu_seconds),
        ("seed", "seed, CPU of the receiving side, s", |r| r.seed.daemon_cpu_seconds),
        ("seed", "seed, sent, MB", |r| r.bytes_sent as f64 / 1e6),
        ("rescan", "rescan, nothing changed, s", |r| r.rescan.seconds),
        ("rescan", "rescan, CPU of both sides, s", |r| r.rescan.client_cpu_seconds + r.rescan.daemon_cpu_seconds),
        ("memory", "peak memory, sender, seed, MiB", |r| r.seed.client_peak_bytes as f64 / MIB),
        ("memory", "peak memory, receiver, seed, MiB", |r| r.seed.daemon_peak_bytes as f64 / MIB),
        ("memory", "peak memory, sender, rescan, MiB", |r| r.rescan.client_peak_bytes as f64 / MIB),
    ];
    println!("| what | coldspare | rsync | ratio |\n|---|---|---|---|");
    let mut out = Vec::new();
    for (section, what, of) in rows {
        if !wants(section) {
            continue;
        }
        let coldspare: Vec<f64> = runs.coldspare.iter().map(of).collect();
        let rsync: Vec<f64> = runs.rsync.iter().map(of).collect();
        let ratio = if rsync.is_empty() { None } else { Some(median(&coldspare) / median(&rsync)) };
        let shown = ratio.map_or("-".into(), |r| format!("{r:.2}"));
        println!("| {what} | {} | {} | {shown} |", spread(&coldspare), spread(&rsync));
        out.push(json!({"what": what, "coldspare": coldspare, "rsync": rsync, "ratio": ratio}));
    }
    println!();
    out
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn spread(values: &[f64]) -> String {
    if values.is_empty() {
        return "not installed".into();
    }
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
    format!("{} ({}–{})", figure(median(values)), figure(low), figure(high))
}

/// Three digits or so.
fn figure(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// CPU, cores, memory, kernel and filesystem in a line.
fn describe_machine(dir: &Path) -> String {
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
fn program_version(program: &str) -> Option<String> {
    run(Command::new(program).arg("--version")).ok()?.lines().next().map(String::from)
}

/// Runs a command to its end and gives back what it printed.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

const SEED: u64 = 20;
const PACKED_BYTES: u64 = 1_000_000_000;
const MIB: f64 = (1 << 20) as f64;
