//! What a verification costs: a deep one beside `b3sum` over the same files, a quick one of a home of many entries, a comparison
//! of it with its active; and what a promotion of it costs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, SEED};
use crate::pair::Pair;
use crate::report::{Result, figure, median, program_version, run, spread};

/// The section that is this part.
pub(crate) const SECTION: &str = "verify";

/// Every file of a tree but coldspare's own, as many to a process as go.
const B3SUM: &str = "find . -path ./.coldspare -prune -o -type f -print0 | xargs -0 b3sum >/dev/null";

/// A daemon that takes less CPU time than this in so long has nothing under way.
const QUIET: Duration = Duration::from_secs(1);
const QUIET_CPU_SECONDS: f64 = 0.1;

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let dir = settings.lasting_dir(SECTION)?;
    let [packed, wide] = ["packed", "wide"].map(|name| dir.join(name));
    let bytes = settings.mib << 20;
    let mut rows = Vec::new();
    {
        let (_pair, verify, tree) = seeded(&packed, |home| home::make_packed(home, bytes, SEED).map(drop))?;
        let hash = || -> Result<f64> { timed(Command::new("sh").args(["-c", B3SUM]).current_dir(&tree)).map(|(seconds, _)| seconds) };
        let (mut deep, mut peer) = (Vec::new(), Vec::new());
        // Once unmeasured: then the cache is warm for both.
        verify(&["--deep"])?;
        for _ in 0..settings.runs {
            deep.push(verify(&["--deep"])?);
            if program_version("b3sum").is_some() {
                peer.push(hash()?);
            }
        }
        rows.push((format!("{} MiB of packs, verify --deep, s", settings.mib), spread(&deep)));
        rows.push(("b3sum of the same files, s".into(), spread(&peer)));
        if !peer.is_empty() {
            rows.push(("speed of verify --deep, ratio to b3sum's".into(), figure(median(&peer) / median(&deep))));
        }
    }
    fs::remove_dir_all(&packed)?;
    let (pair, verify, tree) = seeded(&wide, |home| home::make_wide(home, settings.entries, SEED).map(drop))?;
    verify(&["--quick"])?;
    let quick = (0..settings.runs).map(|_| verify(&["--quick"])).collect::<Result<Vec<f64>>>()?;
    let look =
        || -> Result<f64> { timed(Command::new("find").args([".", "-printf", "%s"]).current_dir(&tree)).map(|(seconds, _)| seconds) };
    let look = (0..settings.runs).map(|_| look()).collect::<Result<Vec<f64>>>()?;
    rows.push((format!("{} entries, verify --quick, s", settings.entries), spread(&quick)));
    rows.push(("`find` that asks for the size of each of them, s".into(), spread(&look)));
    let compared = compared(&pair, settings.runs)?;
    rows.push((format!("{} entries, compared with the active's, nothing differs, s", settings.entries), spread(&compared)));
    let mut promote = Command::new(env!("CARGO_BIN_EXE_coldspare"));
    promote.args(["promote", "--accept-possible-loss", "--accept-lag", "--json", "--config"]).arg(pair.standby_config());
    let (promoted, _) = timed(&mut promote)?;
    rows.push((format!("{} entries, promote without a daemon, s", settings.entries), figure(promoted)));
    println!("| what | value |\n|---|---|");
    for (what, value) in &rows {
        println!("| {what} | {value} |");
    }
    println!();
    Ok(Some(json!({"section": SECTION, "rows": rows})))
}

/// How long both daemons take to compare what they have, as they say themselves.
fn compared(pair: &Pair, runs: usize) -> Result<Vec<f64>> {
    let receiver = pair.receive()?;
    let _sender = pair.send()?;
    run(&mut pair.on_active(&["checkpoint", "--timeout", "600s"]))?;
    // Its watch looks at everything once, after the start.
    loop {
        let before = receiver.cpu_seconds()?;
        std::thread::sleep(QUIET);
        if receiver.cpu_seconds()? - before < QUIET_CPU_SECONDS {
            break;
        }
    }
    let compare = || -> Result<f64> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coldspare"));
        let found: Value = serde_json::from_str(&run(command.args(["verify", "--json", "--config"]).arg(pair.standby_config()))?)?;
        let active = &found["active"];
        match (active["compared"] == true, active["differences"] == json!([]), active["seconds"].as_f64()) {
            (true, true, Some(seconds)) => Ok(seconds),
            _ => Err(format!("not compared, or not equal: {active}").into()),
        }
    };
    compare()?;
    (0..runs).map(|_| compare()).collect()
}

/// Measures one verification with these arguments, in seconds; it finds nothing.
type Verify = Box<dyn Fn(&[&str]) -> Result<f64>>;

/// A standby of a home that `make` makes, while no daemon runs.
fn seeded(at: &Path, make: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<(Pair, Verify, PathBuf)> {
    let source = at.join("home");
    fs::create_dir_all(&source)?;
    make(&source)?;
    let pair = Pair::make(&source, at)?;
    let receiver = pair.receive()?;
    run(&mut pair.send_once())?;
    drop(receiver);
    let tree = pair.destination.clone();
    let config = pair.standby_config();
    let verify: Verify = Box::new(move |args| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coldspare"));
        let (seconds, out) = timed(command.args(["verify", "--json"]).args(args).arg("--config").arg(&config))?;
        let found: Value = serde_json::from_str(&out)?;
        if found["verdict"] == "consistent" { Ok(seconds) } else { Err(format!("the standby is not what was sent: {found}").into()) }
    });
    Ok((pair, verify, tree))
}

fn timed(command: &mut Command) -> Result<(f64, String)> {
    let start = Instant::now();
    let out = run(command)?;
    Ok((start.elapsed().as_secs_f64(), out))
}
