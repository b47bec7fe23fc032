//! `plan`: what coldspare would cost and give on this host, from the real home and from a rehearsal with its own files.

mod cycles;
mod forecast;
mod limits;
mod model;
mod peer;
mod rehearsal;
mod report;
mod samples;
mod speed;
mod survey;
mod watch;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use coldspare_core::exclude::{BITBUCKET, Exclude};
use coldspare_transport::Invitation;
use serde_json::json;

use crate::demo::host::{INTERRUPTED, failed};
use crate::exit::{Code, Failure, Outcome};
use forecast::{ModelError, Wishes, forecast};
use limits::Granted;
use survey::Survey;

/// What `plan` is asked.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// The home, and data stores.
    pub(crate) roots: Vec<PathBuf>,
    /// A folder that a rehearsal makes, on a disk like the standby's.
    pub(crate) scratch: Option<PathBuf>,
    /// The line that `plan-peer` printed; without it both ends are on this host.
    pub(crate) invite: Option<String>,
    /// How long the home is watched; without it, times of files tell what is written.
    pub(crate) watch: Option<Duration>,
    /// Bits a second.
    pub(crate) links: Vec<f64>,
    /// Seconds.
    pub(crate) lag_seconds: f64,
    /// To what size the home is scaled.
    pub(crate) scale: Option<(Measure, f64)>,
    /// Where the picture goes.
    pub(crate) plot: Option<PathBuf>,
    pub(crate) json: bool,
}

/// What a home's size is told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    Repositories,
    Entries,
    Bytes,
}

/// Surveys the home, rehearses with some of its files, prints what to expect.
///
/// # Errors
/// `Usage`: a folder can't be used. `Differs`: the rehearsal failed. With a peer: as [`peer::rehearse`].
pub(crate) fn run(options: &Options) -> Outcome {
    let invitation = options.invite.as_deref().map(|text| text.trim().parse::<Invitation>()).transpose();
    let invitation = invitation.map_err(|e| Failure::usage(format!("--invite: {e}; for a rehearsal `coldspare plan-peer` prints it")))?;
    let exclude = Exclude::new(BITBUCKET).map_err(Failure::usage)?;
    let scratch = Scratch::new(options.scratch.clone(), &options.roots)?;
    let mut survey = survey::survey(&options.roots, &exclude)?;
    let factor = options.scale.map(|(measure, to)| Ok::<f64, Failure>(to / size_of(&survey, measure)?)).transpose()?.unwrap_or(1.0);
    let speed = speed::measure(&survey, &scratch.0)?;
    let costs = match &invitation {
        Some(invitation) => peer::rehearse(&survey.samples, &scratch.0, invitation)?,
        None => rehearsal::rehearse(&survey.samples, &scratch.0)?,
    };
    // Last, since it may take a day: what can't be had is known by now.
    if let Some(duration) = options.watch {
        let watched = watch::watch(&options.roots, &exclude, survey.folders, duration)?;
        survey.minutes = watched.day();
        survey.watched = Some(watched);
    }
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(failed("interrupted"));
    }
    let (scaled, error) = (survey.scaled(factor), ModelError::new(factor));
    let wishes = Wishes { links: options.links.clone(), lag_seconds: options.lag_seconds };
    let limits = Granted::to_this_process().to_raise(scaled.folders);
    let forecast = forecast(&scaled, &costs, &wishes);
    if options.json {
        println!(
            "{}",
            json!({"survey": scaled, "host": speed, "rehearsal": costs, "figures": forecast.figures, "links": forecast.days, "limits_to_raise": limits, "error": error})
        );
    } else {
        print!("{}", report::page(&scaled, &speed, &limits, &forecast, &error));
    }
    if let Some(path) = &options.plot {
        fs::write(path, report::plot(&forecast.days)).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    }
    Ok(Code::Done)
}

/// Serves as the standby of a rehearsal, in a folder that is made for it, until a signal.
///
/// # Errors
/// As [`peer::serve`].
pub(crate) fn run_peer(listen: &str, advertise: Option<&str>, scratch: Option<PathBuf>) -> Outcome {
    let scratch = Scratch::new(scratch, &[])?;
    peer::serve(listen, advertise, &scratch.0)
}

fn size_of(survey: &Survey, measure: Measure) -> Result<f64, Failure> {
    let (size, what) = match measure {
        Measure::Repositories => (survey.repositories, "repositories"),
        Measure::Entries => (survey.entries, "entries"),
        Measure::Bytes => (survey.files().bytes, "bytes"),
    };
    if size == 0 { Err(Failure::usage(format!("this home has no {what} to scale by"))) } else { Ok(size as f64) }
}

/// Parses a link: `100M`, `1G`, in bits a second.
pub(crate) fn parse_link(text: &str) -> Result<f64, String> {
    let trimmed = text.trim_end_matches("bit/s").trim_end_matches("bit");
    let (number, factor) = match trimmed.char_indices().last() {
        Some((at, 'k' | 'K')) => (&trimmed[..at], 1e3),
        Some((at, 'M')) => (&trimmed[..at], 1e6),
        Some((at, 'G')) => (&trimmed[..at], 1e9),
        _ => (trimmed, 1.0),
    };
    let value = number.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
    value
        .map(|n| n * factor)
        .filter(|n| (1e3..=1e13).contains(n))
        .ok_or_else(|| format!("{text:?} is no link, from 1 kbit/s on, such as 100M or 1G"))
}

/// Parses `repositories=52000`.
pub(crate) fn parse_scale(text: &str) -> Result<(Measure, f64), String> {
    let wrong = || format!("{text:?} is none of repositories=N, entries=N, bytes=N");
    let (name, number) = text.split_once('=').ok_or_else(wrong)?;
    let measure = match name {
        "repositories" => Measure::Repositories,
        "entries" => Measure::Entries,
        "bytes" => Measure::Bytes,
        _ => return Err(wrong()),
    };
    let number = number.parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0).ok_or_else(wrong)?;
    Ok((measure, number))
}

/// The folder of the rehearsal, gone at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: Option<PathBuf>, roots: &[PathBuf]) -> Result<Scratch, Failure> {
        let path = dir.unwrap_or_else(|| std::env::temp_dir().join(format!("coldspare-plan-{}", std::process::id())));
        let path = std::path::absolute(&path).map_err(Failure::usage)?;
        let above = path.parent().and_then(|above| above.canonicalize().ok()).unwrap_or_default();
        if let Some(root) = roots.iter().find(|root| root.canonicalize().is_ok_and(|root| above.starts_with(root))) {
            return Err(Failure::usage(format!(
                "{} is in {}, which is only read; --scratch names another place",
                path.display(),
                root.display()
            )));
        }
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|e| Failure::usage(format!("{}: {e}; --scratch names a folder that is made anew", path.display())))?;
        crate::demo::stop_on_signals();
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_scales_are_read() {
        assert_eq!(parse_link("100M"), Ok(1e8));
        assert_eq!(parse_link("2.5Gbit/s"), Ok(2.5e9));
        assert!(parse_link("0").is_err() && parse_link("fast").is_err() && parse_link("-1M").is_err() && parse_link("").is_err());
        assert_eq!(parse_scale("repositories=52000"), Ok((Measure::Repositories, 52_000.0)));
        assert!(parse_scale("repositories").is_err() && parse_scale("repositories=0").is_err() && parse_scale("forks=1").is_err());
    }
}
