//! Whole processes side by side: coldspare and its peers, in turn, on the same home.
//!
//! `cargo bench --bench compare -- [SECTION …] [--short] [--files N] [--runs N] [--seconds N] [--entries N]
//! [--mib N] [--line NAME] [--commits N] [--repository DIR] [--dir DIR] [--json FILE] [--plot FILE]`
//!
//! Sections, or `all` of them, with `--short` on small homes: `seed`, `rescan`, `memory`, `packed` (`copy.rs`, beside an rsync daemon); `file`, `push`, `load`, `lag`
//! (`follow.rs`, beside lsyncd); `scale` (`scale.rs`, `--entries N`, both backends of the watch); `growth` (`growth.rs`, the same home in
//! sizes up to 300,000 entries, or `--entries N`, up to 3,000,000; `--plot FILE` draws it);
//! `repack` (`repack.rs`, `--commits N` in each push, `--repository DIR` for another history than a made-up one); `large`
//! (`large.rs`); `link` (`link.rs`, over emulated
//! lines, `--line NAME` for one of them); `overtake` (`overtake.rs`, `--line loopback` or `--line 50-ms`); `verify`
//! (`verify.rs`, beside b3sum, `--mib N` of packs, `--entries N`); `plan` (`plan.rs`, what `coldspare plan` predicts beside
//! what happens).
//!
//! Both ends run on this host over loopback, with a warm page cache. rsync runs without encryption; its time to seed
//! includes a `sync -f` of the destination, because coldspare returns only when everything is durable. Each run checks
//! that both made the same tree. A part that fails is told, and the others go on. Only ratios within one run of this command mean anything.

mod copy;
mod follow;
mod growth;
mod home;
mod large;
mod link;
mod overtake;
mod pair;
mod plan;
mod plot;
mod process;
mod repack;
mod report;
mod scale;
mod verify;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use report::{Result, describe_machine, program_version};
use serde_json::json;
use tempfile::TempDir;

/// The lines of `all`, where the others would take half an hour more.
const SOME_LINES: [&str; 4] = ["loss-0", "loss-1", "loss-5", "loopback"];

/// What was asked for.
pub(crate) struct Settings {
    sections: Vec<String>,
    pub(crate) files: u64,
    pub(crate) runs: usize,
    /// Changes of each kind in a run.
    pub(crate) changes: usize,
    /// How long pushes go on.
    pub(crate) seconds: u64,
    /// How many entries the home of `scale` has.
    pub(crate) entries: u64,
    /// How many entries the homes of `growth` have.
    pub(crate) sizes: Vec<u64>,
    /// Where the picture of `growth` goes.
    pub(crate) plot: Option<PathBuf>,
    /// How large the packs of `verify` are.
    pub(crate) mib: u64,
    /// How large the packs of `packed` are; a file that pushes overtake on loopback is twice that.
    pub(crate) packed_bytes: u64,
    /// How large the file of `large` is.
    pub(crate) large_bytes: u64,
    /// What goes over an emulated line: half a minute of it.
    pub(crate) line_bytes: u64,
    /// When a transfer over a line is ended.
    pub(crate) transfer_max: Duration,
    /// How long a change may take a peer until it counts as having given out.
    pub(crate) peer_patience: Duration,
    /// How long nothing happens, while daemons are looked at.
    pub(crate) idle: Duration,
    /// How many homes `plan` predicts, the smallest first.
    pub(crate) planned: usize,
    /// How many ways of `repack` are left out, the first ones.
    pub(crate) ways_skipped: usize,
    /// Commits of a push, of a history that is made up.
    pub(crate) commits: usize,
    /// How often a transfer over a line is measured, if not [`Settings::runs`] times.
    pub(crate) line_runs: Option<usize>,
    /// Which of the lines of `link` are measured; none: all.
    pub(crate) lines: Vec<String>,
    /// Whose history `repack` takes.
    pub(crate) repository: Option<PathBuf>,
    /// Where homes are made.
    dir: PathBuf,
    json: Option<PathBuf>,
}

impl Settings {
    /// Small homes, one run of each.
    fn shorten(&mut self) {
        self.files = 10_000;
        self.runs = 1;
        self.changes = 20;
        self.seconds = 5;
        self.entries = 10_000;
        self.sizes = growth::SMALL_SIZES.into();
        self.mib = 128;
        self.packed_bytes = 100_000_000;
        self.large_bytes = 100_000_000;
        self.line_bytes = 20_000_000;
        self.transfer_max = Duration::from_secs(6);
        self.peer_patience = Duration::from_secs(10);
        self.idle = Duration::from_secs(5);
        self.planned = 2;
        self.ways_skipped = 3;
        self.commits = 5;
        self.lines = ["loss-0", "loss-1", "loopback"].map(String::from).into();
    }

    pub(crate) fn wants(&self, section: &str) -> bool {
        self.sections.iter().any(|s| s == section)
    }

    /// A folder for many files, which stays until the end of all.
    ///
    /// For some minutes ext4 passes over inodes that were deleted, one by one: whatever creates files next would pay for
    /// what was measured before.
    pub(crate) fn lasting_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// A folder for few, large files, which goes when it is dropped.
    pub(crate) fn passing_dir(&self, name: &str) -> Result<TempDir> {
        Ok(tempfile::Builder::new().prefix(name).tempdir_in(&self.dir)?)
    }
}

fn sections() -> impl Iterator<Item = &'static str> {
    let others = [
        scale::SECTION,
        growth::SECTION,
        repack::SECTION,
        large::SECTION,
        link::SECTION,
        overtake::SECTION,
        verify::SECTION,
        plan::SECTION,
    ];
    copy::SECTIONS.into_iter().chain(follow::SECTIONS).chain(others)
}

fn main() -> Result<()> {
    let mut settings = settings()?;
    let all = tempfile::Builder::new().prefix("coldspare-compare-").tempdir_in(&settings.dir)?;
    settings.dir = all.path().into();
    let machine = describe_machine(&settings.dir);
    println!("{machine}\n");
    let peers = ["rsync", "lsyncd"].map(|name| (name, program_version(name)));
    println!("coldspare {}", env!("CARGO_PKG_VERSION"));
    for (name, version) in &peers {
        println!("{name}: {}", version.as_deref().unwrap_or("NOT INSTALLED, not compared"));
    }
    println!("page cache warm; median (lowest–highest)\n");
    let has = |name: &str| peers.iter().any(|(peer, version)| *peer == name && version.is_some());
    let (rsync, mut parts, start) = (has("rsync"), Parts::default(), Instant::now());
    parts.add("copies", || copy::compare_all(&settings, rsync));
    parts.add("follow", || follow::compare_all(&settings, has("lsyncd") && rsync));
    parts.add(scale::SECTION, || scale::measure_all(&settings, rsync));
    parts.add(growth::SECTION, || growth::measure_all(&settings));
    parts.add(repack::SECTION, || repack::measure_all(&settings, rsync));
    parts.add(large::SECTION, || large::measure_all(&settings, rsync));
    parts.add(link::SECTION, || link::measure_all(&settings, rsync));
    parts.add(overtake::SECTION, || overtake::measure_all(&settings));
    parts.add(verify::SECTION, || verify::measure_all(&settings));
    parts.add(plan::SECTION, || plan::measure_all(&settings));
    println!("all of it took {:.0} s", start.elapsed().as_secs_f64());
    let Parts { tables, failed } = parts;
    if let Some(path) = &settings.json {
        let versions: Vec<_> = peers.iter().map(|(name, version)| json!({"name": name, "version": version})).collect();
        let all = json!({"machine": machine, "coldspare": env!("CARGO_PKG_VERSION"), "peers": versions, "homes": tables});
        fs::write(path, serde_json::to_vec_pretty(&all)?)?;
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("not measured: {}", failed.join(", ")).into()) }
}

/// What was measured so far; a part that fails doesn't stop the others.
#[derive(Default)]
struct Parts {
    tables: Vec<serde_json::Value>,
    failed: Vec<&'static str>,
}

impl Parts {
    fn add<T: IntoIterator<Item = serde_json::Value>>(&mut self, name: &'static str, measure: impl FnOnce() -> Result<T>) {
        let start = Instant::now();
        let before = self.tables.len();
        match measure() {
            Ok(tables) => self.tables.extend(tables),
            Err(e) => {
                println!("{name} failed: {e}\n");
                self.failed.push(name);
            }
        }
        if self.tables.len() > before {
            eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        }
    }
}

fn settings() -> Result<Settings> {
    let dir = env!("CARGO_TARGET_TMPDIR").into();
    let mut settings = Settings {
        sections: Vec::new(),
        files: 300_000,
        runs: 3,
        changes: 100,
        seconds: 60,
        entries: 1_000_000,
        sizes: growth::sizes_up_to(300_000),
        plot: None,
        mib: 4096,
        packed_bytes: 1_000_000_000,
        large_bytes: 1_000_000_000,
        line_bytes: 400_000_000,
        transfer_max: Duration::from_secs(60),
        peer_patience: follow::GIVE_UP,
        idle: Duration::from_secs(30),
        planned: 3,
        ways_skipped: 0,
        commits: 25,
        line_runs: None,
        lines: Vec::new(),
        repository: None,
        dir,
        json: None,
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} takes a value"));
        match arg.as_str() {
            "all" => {
                settings.sections.extend(sections().map(String::from));
                settings.line_runs = Some(1);
                if settings.lines.is_empty() {
                    settings.lines = SOME_LINES.map(String::from).into();
                }
            }
            name if sections().any(|section| section == name) => settings.sections.push(arg),
            "--short" => settings.shorten(),
            "--commits" => settings.commits = value()?.parse()?,
            "--files" => settings.files = value()?.parse()?,
            "--runs" => settings.runs = value()?.parse::<usize>()?.max(1),
            "--seconds" => settings.seconds = value()?.parse()?,
            "--entries" => {
                settings.entries = value()?.parse()?;
                settings.sizes = growth::sizes_up_to(settings.entries);
            }
            "--plot" => settings.plot = Some(value()?.into()),
            "--mib" => settings.mib = value()?.parse()?,
            "--line" => settings.lines.push(value()?),
            "--repository" => settings.repository = Some(value()?.into()),
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
