/* A Java context: snippets of one JShell in this virtual machine, by the protocol of child.py. */

import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Locale;
import java.util.stream.Collectors;
import jdk.jshell.DeclarationSnippet;
import jdk.jshell.Diag;
import jdk.jshell.EvalException;
import jdk.jshell.JShell;
import jdk.jshell.JShellException;
import jdk.jshell.Snippet;
import jdk.jshell.SnippetEvent;
import jdk.jshell.SourceCodeAnalysis;
import jdk.jshell.UnresolvedReferenceException;

public class Cells {
    static final int TEXT_LIMIT = 1 << 20; // of one value, message or traceback, in characters
    static final List<String> IMPORTS = List.of( // what the jshell tool imports by default
        "java.io.*", "java.math.*", "java.net.*", "java.nio.file.*", "java.util.*", "java.util.concurrent.*",
        "java.util.function.*", "java.util.prefs.*", "java.util.regex.*", "java.util.stream.*");

    static PrintStream replies;
    static JShell shell;
    static volatile boolean running;
    static volatile boolean interrupted;

    public static void main(String[] arguments) throws Exception {
        sun.misc.Signal.handle(new sun.misc.Signal("INT"), signal -> interrupt());
        var cells = new BufferedReader(new InputStreamReader(new FileInputStream("/proc/self/fd/3"), StandardCharsets.US_ASCII));
        replies = new PrintStream(new FileOutputStream("/proc/self/fd/4"), true);
        shell = JShell.builder().executionEngine("local").build();
        for (String name : IMPORTS) shell.eval("import " + name + ";");
        for (String line; (line = cells.readLine()) != null; ) {
            interrupted = false;
            running = true;
            try {
                run(decoded(line));
            } catch (Throwable problem) { // the interrupt of a cell that had just ended, or a fault of JShell
                error(interrupted ? "KeyboardInterrupt" : problem.getClass().getSimpleName(), "" + problem.getMessage(), "" + problem);
            }
            running = false;
            System.out.flush();
            System.err.flush();
            replies.println("end");
        }
        Runtime.getRuntime().halt(0);
    }

    static void interrupt() {
        if (!running) return;
        interrupted = true;
        shell.stop();
    }

    static void run(String code) {
        SourceCodeAnalysis analysis = shell.sourceCodeAnalysis();
        for (String rest = code; !rest.isBlank(); ) {
            var part = analysis.analyzeCompletion(rest);
            boolean whole = part.completeness().isComplete() && part.source() != null;
            String source = whole ? part.source() : rest;
            rest = whole ? part.remaining() : "";
            boolean last = rest.isBlank();
            for (SnippetEvent event : shell.eval(source)) {
                if (event.causeSnippet() != null) continue; // an older snippet that this one changes
                if (interrupted) {
                    error("KeyboardInterrupt", "", "KeyboardInterrupt");
                    return;
                }
                if (event.status() == Snippet.Status.REJECTED) {
                    rejected(event.snippet(), source);
                    return;
                }
                if (event.exception() != null) {
                    thrown(event.exception());
                    return;
                }
                if (event.status() == Snippet.Status.RECOVERABLE_NOT_DEFINED) {
                    String unknown = shell.unresolvedDependencies((DeclarationSnippet) event.snippet()).collect(Collectors.joining(", "));
                    error("CompilationError", "cannot find symbol: " + unknown, "cannot find symbol: " + unknown + "\n" + source);
                    return;
                }
                if (last && isExpression(event.snippet()) && event.value() != null) {
                    System.out.flush();
                    reply("result", event.value());
                }
            }
        }
    }

    static boolean isExpression(Snippet snippet) { // one that has no name of its own is a variable to JShell: $1
        return snippet.kind() == Snippet.Kind.EXPRESSION || snippet.subKind() == Snippet.SubKind.TEMP_VAR_EXPRESSION_SUBKIND;
    }

    static void rejected(Snippet snippet, String source) {
        List<Diag> found = shell.diagnostics(snippet).filter(Diag::isError).collect(Collectors.toList());
        String value = found.isEmpty() ? "the snippet was rejected" : found.get(0).getMessage(Locale.ENGLISH);
        String all = found.stream().map(diag -> {
            int line = 1 + (int) source.chars().limit(Math.max(0, diag.getPosition())).filter(c -> c == '\n').count();
            return line + ": " + diag.getMessage(Locale.ENGLISH);
        }).collect(Collectors.joining("\n"));
        error("CompilationError", value, all + "\n" + source);
    }

    static void thrown(JShellException exception) {
        String name = exception instanceof EvalException ? ((EvalException) exception).getExceptionClassName()
            : exception instanceof UnresolvedReferenceException ? "UnresolvedReferenceException" : exception.getClass().getName();
        String value = exception.getMessage() == null ? "" : exception.getMessage();
        StringBuilder trace = new StringBuilder(name + (value.isEmpty() ? "" : ": " + value));
        for (StackTraceElement at : exception.getStackTrace()) {
            boolean ofCell = at.getFileName() != null && at.getFileName().startsWith("#"); // #3 is the third snippet
            if (!ofCell) trace.append("\n    at ").append(at);
            else trace.append("\n    at ").append(at.getMethodName()).append('(' + at.getFileName() + ':' + at.getLineNumber() + ')');
            if (at.getMethodName().equals("do_it$")) break; // below it is JShell
        }
        error(name, value, trace.toString());
    }

    static void error(String name, String value, String traceback) {
        System.out.flush();
        System.err.flush();
        reply("error", name, value, traceback);
    }

    static void reply(String kind, String... texts) {
        StringBuilder line = new StringBuilder(kind);
        for (String text : texts) line.append(' ').append(encoded(text));
        replies.println(line);
    }

    static String encoded(String text) {
        StringBuilder digits = new StringBuilder();
        for (byte one : text.substring(0, Math.min(text.length(), TEXT_LIMIT)).getBytes(StandardCharsets.UTF_8)) {
            digits.append(Character.forDigit(one >> 4 & 15, 16)).append(Character.forDigit(one & 15, 16));
        }
        return digits.length() == 0 ? "-" : digits.toString();
    }

    static String decoded(String digits) {
        if (digits.equals("-")) return "";
        byte[] bytes = new byte[digits.length() / 2];
        for (int i = 0; i < bytes.length; i++) bytes[i] = (byte) Integer.parseInt(digits.substring(2 * i, 2 * i + 2), 16);
        return new String(bytes, StandardCharsets.UTF_8);
    }
}
