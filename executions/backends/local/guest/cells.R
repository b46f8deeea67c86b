# An R context: cells evaluated in the global environment, by the protocol of child.py.

local({
  cells <- file("/proc/self/fd/3", "r", raw = TRUE)
  replies <- file("/proc/self/fd/4", "w", raw = TRUE)

  decoded <- function(digits) {
    if (digits == "-") return("")
    at <- seq(1, nchar(digits) - 1, 2)
    text <- rawToChar(as.raw(strtoi(substring(digits, at, at + 1), 16L)))
    Encoding(text) <- "UTF-8"
    text
  }
  encoded <- function(value) {
    bytes <- if (is.raw(value)) value else charToRaw(enc2utf8(paste(value, collapse = "\n")))
    if (length(bytes)) paste(as.character(bytes), collapse = "") else "-"
  }
  reply <- function(kind, ...) {
    flush(stdout())
    cat(kind, vapply(list(...), encoded, ""), "\n", file = replies)
    flush(replies)
  }

  # every visible value is printed as at R's prompt, but for the last one, which is the cell's
  run <- function(code) {
    expressions <- parse(text = code, keep.source = TRUE)
    for (at in seq_along(expressions)) {
      seen <- withVisible(eval(expressions[[at]], globalenv()))
      if (!seen$visible) next
      if (at < length(expressions)) print(seen$value)
      else reply("result", utils::capture.output(print(seen$value)))
    }
  }
  plots <- file.path(tempdir(), "plots")
  dir.create(plots)
  options(device = function(...) {
    grDevices::png(file.path(plots, "%03d.png"), 960, 720, res = 120, type = "cairo")
  })
  show_plots <- function() {
    grDevices::graphics.off()
    for (plot in list.files(plots, full.names = TRUE)) {
      reply("png", readBin(plot, "raw", file.size(plot)))
      unlink(plot)
    }
  }
  failed <- function(problem) {
    call <- conditionCall(problem)
    where <- if (is.null(call)) "Error" else paste("Error in", paste(deparse(call), collapse = " "))
    reply("error", class(problem)[[1]], conditionMessage(problem), paste0(where, ": ", conditionMessage(problem)))
  }
  warned <- function(warning) {
    message("Warning: ", conditionMessage(warning))
    invokeRestart("muffleWarning")
  }

  repeat {
    line <- tryCatch(readLines(cells, 1), interrupt = function(...) NULL)
    if (is.null(line)) next
    if (!length(line)) quit("no")
    tryCatch(
      withCallingHandlers(run(decoded(line)), warning = warned),
      error = failed,
      interrupt = function(...) reply("error", "KeyboardInterrupt", "", "KeyboardInterrupt")
    )
    tryCatch(show_plots(), error = failed, interrupt = function(...) NULL)
    reply("end")
  }
})
