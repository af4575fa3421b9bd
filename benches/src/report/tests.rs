use super::*;
use crate::bars;
use crate::catalogue::BENCHMARKS;
use crate::host::Host;
use crate::results::{Absent, Program, Refusal, Sample, VERSION};

/// A run of the first benchmark, with everything that can be in one.
fn results() -> Results {
    let kinds = BENCHMARKS[0].figures.iter();
    let mut figures: Vec<Figure> = kinds
        .map(|kind| Figure::new(BENCHMARKS[0].name, kind))
        .collect();
    for round in 0..20 {
        for (side, base) in [(OURS, 1.0), ("firecracker", 20.0)] {
            let value = base + f64::from(round) / 10.0;
            figures[0]
                .cell(side, None)
                .samples
                .push(Sample { round, value });
        }
    }
    figures[0].cell("qemu", None).failures.push(Refusal {
        round: 0,
        reason: "it said <script>alert(1)</script>".to_owned(),
        log: "</pre><script src=http://example.org/x.js></script>".to_owned(),
    });
    figures[1].cell("qemu", None).not_offered = Some("no".to_owned());
    for figure in &mut figures {
        figure.conclude();
    }
    Results {
        version: VERSION,
        began: "2000-01-01T00:00:00Z".to_owned(),
        seconds: 61.0,
        command: "bench".to_owned(),
        interrupted: true,
        host: Host::describe(),
        sides: vec![Program {
            side: OURS.to_owned(),
            vmm: true,
            path: "/x".to_owned(),
            version: "1".to_owned(),
            sha256: "00".to_owned(),
        }],
        absent: vec![Absent {
            side: "cloud-hypervisor".to_owned(),
            reason: "there is no program".to_owned(),
        }],
        bars: bars::judge(&figures),
        figures,
    }
}

#[test]
fn the_report_has_plots_tables_failures_and_bars() {
    let page = html(&results()).unwrap();
    for wanted in [
        "<svg",
        "Interrupted",
        "left out: there is no program",
        "not offered: no",
        "qemu, round 0:",
        "class=\"text held\">held",
        "not measured",
        "prefers-color-scheme: dark",
        "@media print",
    ] {
        assert!(page.contains(wanted), "{wanted} is not in the report");
    }
}

#[test]
fn what_a_vmm_wrote_is_text_not_page() {
    let page = html(&results()).unwrap();
    assert!(!page.contains("<script"), "a log became part of the page");
}

#[test]
fn the_report_loads_nothing() {
    let page = html(&results()).unwrap();
    let without_names = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in ["src=", "@import", "url(", "<link"] {
        // The log in the results above names a source; it is text.
        let found = without_names.matches(outside).count();
        let in_log = usize::from(outside == "src=");
        assert_eq!(found, in_log, "{outside}");
    }
}

#[test]
fn results_are_read_back_as_they_were_written() {
    let results = results();
    let written = serde_json::to_string(&results).unwrap();
    let read: Results = serde_json::from_str(&written).unwrap();
    assert_eq!(read.figures.len(), results.figures.len());
    for (read, kept) in read.figures.iter().zip(&results.figures) {
        assert_eq!(read.cells.len(), kept.cells.len());
        for (read, kept) in read.cells.iter().zip(&kept.cells) {
            assert_eq!(
                (&read.samples, &read.failures),
                (&kept.samples, &kept.failures)
            );
        }
    }
    let unknown = written.replacen("\"version\":1", "\"version\":1,\"more\":2", 1);
    assert!(serde_json::from_str::<Results>(&unknown).is_err());
}

#[test]
fn a_run_without_values_has_a_report_too() {
    let mut empty = results();
    empty.figures.clear();
    empty.bars.clear();
    assert!(html(&empty).unwrap().contains("None of the benchmarks"));
}
